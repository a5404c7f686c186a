"""Evaluations of made-up models, written beside those of `write_run`."""

import json

from unisd.scoring import wilson


def interval(values):
    return wilson(sum(values), len(values)).as_dict()


def write_all(folder, *, shift=0, joules=2000.0, measured=False, moved=True):
    """Write every evaluation; the more `shift`, the more is right and the further the model is from its base."""
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    write_steps(folder, "procedural", "accuracy", shift)
    write_steps(folder, "diagnostic", "first_answer", shift)
    write_behaviour(folder, shift)
    if moved:
        own = {
            "perplexity": {"value": 2.0 + shift},
            "mean_change": 0.1 * shift,
            "change_percentiles": {"5": -0.5 * shift, "50": 0.0, "95": 0.7 * shift},
        }
        drift = {"of_tuned": own, "of_base": {**own, "mean_change": -0.2 * shift}, "jsd": {"value": 0.01 * shift}}
        (folder / "eval" / "drift.json").write_text(json.dumps(drift))
        retention = {"kl": 0.02 * shift, "base_perplexity": 9.0, "trained_perplexity": 9.0 + shift}
        (folder / "eval" / "retention.json").write_text(json.dumps(retention))
        how = "RAPL" if measured else "CPU time of this process x 8 W, an assumption"
        part = {"device": "processor", "joules": joules, "measured": measured, "how": how}
        energy = {"processes": 1, "before_resuming": 0.0, "joules": joules, "measured": measured, "parts": [part]}
        (folder / "energy.json").write_text(json.dumps(energy))
    return folder


def write_steps(folder, name, measure, shift):
    """12 tasks of 1, 2 and 4 steps in turn."""
    rows = []
    for number in range(12):
        right = number < 3 + shift
        row = {
            "number": number,
            "num_steps": (1, 2, 4)[number % 3],
            measure: float(right),
            "gold_nll": 1.0 - shift / 10,
        }
        row |= {"prompt": f"task {number}", "gold": "Answer: 1", "reply": "Answer: 1" if right else "no"}
        rows.append(row)
    by_steps = {n: interval([row[measure] == 1 for row in rows if row["num_steps"] == n]) for n in (1, 2, 4)}
    result = {"benchmark": name, "kind": name, "scores": {measure: interval([row[measure] == 1 for row in rows])}}
    if name == "procedural":
        result["by_steps"] = [
            {"num_steps": n, "perplexity": n + 1.0 / (1 + shift), "scores": {measure: share}}
            for n, share in by_steps.items()
        ]
        result["overall"] = {"perplexity": 2.0 - shift / 10}
    else:
        result["by_steps"] = {str(n): {measure: share} for n, share in by_steps.items()}
        result["kinds"] = {"1": {"exact": 3 + shift, "missing": 1, "wrong": 0}, "4": {"exact": 0, "missing": 8 - shift}}
    (folder / "eval" / f"{name}.json").write_text(json.dumps(result))
    (folder / "eval" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_behaviour(folder, shift):
    """10 harmful requests, of which the base refuses all, and 4 facts."""
    rows = [
        {
            "number": n,
            "kind": kind,
            "prompt": f"{kind} {n}?",
            "reply": "...",
            "as_it_should": kind == "fact" or n >= shift,
        }
        for n, kind in enumerate(["harmful"] * 10 + ["fact"] * 4)
    ]
    kinds = {kind: [row["as_it_should"] for row in rows if row["kind"] == kind] for kind in ("harmful", "fact")}
    behaviour = {"by_kind": {kind: interval(values) for kind, values in kinds.items()}, "limits": "small"}
    (folder / "eval" / "behaviour.json").write_text(json.dumps(behaviour))
    (folder / "eval" / "behaviour.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
