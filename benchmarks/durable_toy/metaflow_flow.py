"""The toy of benchmarks/durable_toy in Metaflow: `python metaflow_flow.py run`; after a kill, `... resume`."""

import time

from metaflow import FlowSpec, Parameter, step


class ToyFlow(FlowSpec):
    items = Parameter("items", default=20)
    item_s = Parameter("item_s", default=0.5)

    @step
    def start(self):
        self.numbers = list(range(self.items))
        self.next(self.square)

    @step
    def square(self):
        self.squares = []
        for number in self.numbers:
            time.sleep(self.item_s)
            print("item", number, flush=True)
            self.squares.append(number**2)
        self.next(self.end)

    @step
    def end(self):
        self.total = sum(self.squares)
        print("total", self.total, flush=True)


if __name__ == "__main__":
    ToyFlow()
