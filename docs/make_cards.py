"""Write the facts of the shipped checkpoints into their model cards: python docs/make_cards.py

Each card in ``docs/models`` has a table between two comments; it follows from config.json alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genssm import checkpoint as checkpoints
from genssm.folders import shipped_folders

CARDS = Path(__file__).parent / "models"
BEGIN, END = "<!-- facts of config.json -->\n", "<!-- end of the facts -->\n"


def table(folder: Path) -> str:
    """The facts of a checkpoint as a table in Markdown."""
    config = json.loads((folder / "config.json").read_text())
    model = checkpoints.load(folder).model
    stages = list(_stages(config["training"]))
    size = sum(file.stat().st_size for file in folder.iterdir())
    rows = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "files": f"{size / 2**20:.1f} MiB",
        "layers": f"{config['model']['layer']}, N = {config['model']['d_state']}",
        "width and blocks of each level": ", ".join(
            f"{width} × {blocks}"
            for width, blocks in zip(
                config["model"]["d_model"], config["model"]["n_layers"], strict=True
            )
        ),
        "pools": ", ".join(map(str, config["model"]["pools"])) or "none",
        "training": " + ".join(
            f"{s['steps']:,} steps, {s['tokens'] / 1e6:.1f} M tokens, {s['minutes']:.0f} minutes"
            for s in reversed(stages)
        ),
        "longest training sequence": f"{stages[0]['recipe']['train']['length']:,} tokens",
        "averaged weights": str(stages[0]["recipe"]["train"].get("ema", 0.0) or "no"),
        "steps skipped": str(sum(s.get("skipped", 0) for s in stages)),
    }
    for name, metric in config["metrics"].items():
        if str(metric.get("unit")).startswith("bits/"):
            rows[name] = f"{metric['value']:.4g} {metric['unit']}"
        elif "samples" in metric:
            rows |= _judged(name, metric)
    lines = [f"| {name} | {value} |\n" for name, value in rows.items()]
    return "".join(["| | |\n| --- | --- |\n", *lines])


def _judged(name: str, metric: dict[str, Any]) -> dict[str, str]:
    """What was found in samples, of pictures and sound by a classifier, beside held-out data."""
    given = ", ".join(f"{key} {value}" for key, value in metric["settings"].items())
    facts = {
        "recognised": "recognised",
        "frechet": "Fréchet distance from training data",
        "inception": "score by its classes",
        "diversity": "mean distance within a class",
        "nearest": "median distance to the nearest training example",
        "distinct": "different runs of four words over all",
        "copied": "share that is in the training text word for word",
    }
    rows = {
        f"{name}: {title}": f"{metric[key]:.4g} (held-out data: {metric['held out'][key]:.4g})"
        for key, title in facts.items()
        if key in metric
    }
    if "copies" in metric:
        nearer = f"{name}: nearer to training data than 99 % of held-out data"
        rows[nearer] = f"{metric['copies']:.1%}"
    return {name: f"{metric['samples']}, {given}"} | rows


def _stages(training: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The last training, and those whose checkpoints it began with."""
    while training:
        yield training
        training = training.get("before")


def filled(card: str, facts: str) -> str:
    """A card with its table replaced."""
    before, _, rest = card.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{facts}{END}{after}"


def main() -> None:
    """Fill every card."""
    for name, folder in shipped_folders().items():
        file = CARDS / f"{name}.md"
        file.write_text(filled(file.read_text(), table(folder)))


if __name__ == "__main__":
    main()
