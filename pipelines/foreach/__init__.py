"""`foreach`: a stage of a pipeline file as a template, of which there is one copy per combination of values.

| word     | meaning                                                                                       |
|----------|-----------------------------------------------------------------------------------------------|
| template | a stage that has `foreach`, or needs one that has it: as it is written                        |
| copy     | a stage of the pipeline made from a template, with one value for each field of the `foreach`s |
| value    | one of the values of a field, with its name: the part of copies' names that stands for it     |

The templates are replaced by their copies before the file is validated, so everything behind sees plain stages. Why
so: docs/design/0007.
"""
