"""Made-up examples in the forms that zero-shot sets come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "lambada_openai": [
        {"context": "The kite rose above the hill, and Ada let out more string. Higher went the", "target": "kite"},
        {"context": "He looked for his boat all day. In the evening he had found his", "target": "boat"},
        {"context": "Here", "target": "it is \u00e9t\u00e9"},
    ],
    "hellaswag": [
        {"context": "Baking: A man kneads dough. he", "choices": ["puts it into an oven.", "eats a car."], "label": 0},
        {
            "context": "Rowing: Two women carry a boat to the water. they",
            "choices": ["paint it.", "step into it and row away over the whole lake.", "sell the lake.", "sleep."],
            "label": 1,
        },
    ],
    "piqa": [
        {"context": "Question: keep bread fresh\nAnswer:", "choices": ["in a box", "in a river"], "label": 0},
        {"context": "Question: \u00e4 b\nAnswer:", "choices": ["\u00fc", "\u00fc\u00fc\u00fc"], "label": 1},
    ],
    "winogrande": [
        {
            "contexts": ["The cup fell off the shelf since the cup", "The cup fell off the shelf since the shelf"],
            "continuation": "was too near the edge.",
            "label": 0,
        },
        {
            "contexts": ["Ben thanked Tom since Ben", "Ben thanked Tom since Tom"],
            "continuation": "had helped.",
            "label": 1,
        },
    ],
    "fda": [
        {"context": "Name: sky. Colour: blue. The colour of the sky is", "answers": ["blue", "azure"]},
        {"context": "One two three one two", "answers": ["three"]},
    ],
}


def write_examples(folder: Path) -> Path:
    """Write a file for each task. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in EXAMPLES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
