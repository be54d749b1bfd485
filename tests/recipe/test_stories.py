"""A real model: a 4-layer student cut from stories260K is distilled on real stories."""

import json

from limbeck.recipe.document import Document
from limbeck.recipe.resolve import resolve
from limbeck.recipe.run import run


def test_stories(shared, tmp_path):
    stories = shared / "data" / "stories"
    held_out = tmp_path / "valid.jsonl"
    lines = (stories / "valid.jsonl").read_text().splitlines(keepends=True)
    held_out.write_text("".join(lines[:40]))
    recipe = {
        "student": {"from": "teacher", "layers": [0, 1, 2, 4], "max_length": 256},
        "teachers": {"big": {"name": str(shared / "models" / "stories260K")}},
        "source": {"path": str(stories / "train.jsonl"), "holdout": str(held_out)},
        "terms": [{"objective": "forward_kl"}],
        "train": {"steps": 200, "batch_tokens": 2048, "learning_rate": 2e-3},
        "evals": ["agreement"],
        "compare": "labels",
    }
    run(resolve(Document(recipe, {})), tmp_path / "run")
    agreement = json.loads((tmp_path / "run" / "report.json").read_text())["agreement"]
    assert agreement["after"]["kl_nats"] * 3 < agreement["before"]["kl_nats"]
    assert agreement["after"]["kl_nats"] < agreement["control"]["kl_nats"]
    assert agreement["after"]["top1"] > agreement["control"]["top1"]
