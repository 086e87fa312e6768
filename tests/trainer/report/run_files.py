"""A small run directory, whole, for the report's tests."""

import json
from pathlib import Path
from typing import Any

ATTACK = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"


def case(name: str, right: float, none: float) -> dict[str, Any]:
    losses = {"right": right, "shuffled": none + 0.1, "none": none}
    return {
        "name": name,
        "note": f"note of {name}",
        "right_entry_rate": 0.75,
        "conditions": {k: {"loss": v, "accuracy": 0.5, "masks": 64} for k, v in losses.items()},
    }


def evaluation(right: float = 2.0, none: float = 4.0) -> dict[str, Any]:
    return {"k": 5, "masks": 64, "cases": [case("own entry in the memory", right, none)]}


def sample(text: str = "lisbon is by the tagus .", title: str = "Lisbon") -> dict[str, Any]:
    return {
        "text": "lisbon lies by the tagus.",
        "tokens": ["[CLS]", "lisbon", "lies", "by", "the", "tag", "##us", ".", "[SEP]", "[PAD]"],
        "masked": [
            {
                "position": 6,
                "truth": "##us",
                "predictions": [
                    {"token": "##gle", "probability": 0.2},
                    {"token": "##us", "probability": 0.7},
                ],
                "predictions_without_memory": [{"token": "##s", "probability": 0.4}],
            },
            {
                "position": 1,
                "truth": "lisbon",
                "predictions": [{"token": "porto", "probability": 0.6}],
                "predictions_without_memory": [{"token": "he", "probability": 0.3}],
            },
        ],
        "layers": [
            {
                "layer": 4,
                "entries": [
                    {
                        "id": 7,
                        "title": title,
                        "source": "wiki",
                        "text": text,
                        "score": 9.5,
                        "weight": 0.625,
                        "own_document": True,
                    }
                ],
            }
        ],
    }


def metrics(steps: int = 20) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {
            "kind": "train",
            "step": step,
            "time_s": 0.5 * step,
            "loss": 10.0 / step,
            "mlm_loss": 9.0 / step,
            "retrieval_loss": 1.0 / step,
            "mlm_accuracy": 0.1,
            "right_entry_rate": 0.9,
            "sequences_per_s": 100.0,
            "retrieval_ms": 12.5,
            "staleness_steps": step % 10,
            "epoch": 1,
            "rss_gib": 1.25,
            "memory_bytes": {"keys": 3 * 2**20, "tokens": 2**20},
        }
        for step in range(1, steps + 1)
    ]
    refresh = {"epoch": 2, "encoder_step": 8, "seconds_total": 3.0, "seconds_stood_still": 0.05}
    lines.insert(10, {"kind": "refresh", "step": 10, "mode": "async", **refresh})
    lines.append({"kind": "eval", "step": 20, "loss": 2.0, "loss_without_memory": 4.0})
    lines.append({"kind": "event", "step": 20, "message": "finished"})
    return lines


def write_run(run_dir: Path, **parts: Any) -> Path:
    """Write a run; ``metrics``, ``evaluation``, ``samples``, ``notes`` replace what is usual."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = parts.get("metrics", metrics())
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {
        "evaluation": evaluation(),
        "samples": [sample()],
        "notes": {"source": "Some encyclopedia", "licence": "CC BY-SA 4.0"},
        **parts,
    }
    for name in ("evaluation", "samples", "notes"):
        (run_dir / f"{name}.json").write_text(json.dumps(found[name]))
    (run_dir / "config.toml").write_text('seed = 3\n[memory]\ntop_k = 5\npath = "a/b"\n')
    return run_dir
