"""Scores a model by a test set of real clips and their captions: chooses, generates, measures, writes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from pipelines.config import DataConfig, EvaluateConfig
from pipelines.evidence import NetworkScores, Row, shapes
from pipelines.features import Pair, embed_texts, extract
from pipelines.manifests import beside, read_manifest
from pipelines.prompts import Prompt
from pipelines.sampling import generate, model_id, sampler_settings
from pipelines.shapes import Fields, parse_caption
from t2v import storage
from t2v.config import SampleConfig

NOTES = [
    "Frechet distances fall as clips are added, even between equal distributions: compare rows of equal clips only.",
    "A frozen clip repeats its first frame, which only the distance of clips can see.",
]
_FEWEST = 4  # two halves of two clips: one clip has no covariance


def evaluate(
    run_dir: str,
    config: EvaluateConfig,
    sample: SampleConfig,
    data: DataConfig,
    model_folder: str,
    picture_only_colours: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores the model on `config.clips` test clips with one caption each; writes and returns scores/scores.json.

    Videos that `run_dir` lacks are generated first. With the same model, test set and settings as before the scores are
    only read back. `picture_only_colours` are those that no training clip had. ValueError or FileNotFoundError for
    settings and files that cannot work, ModuleNotFoundError for stand-in networks that are not installed.
    """
    path = storage.join(run_dir, "scores", "scores.json")
    inputs = _inputs(config, sample, data, model_folder, picture_only_colours)
    if storage.exists(path) and (scores := storage.read_json(path))["inputs"] == inputs:
        print(table(scores))
        return scores
    networks = _networks(config)
    chosen = choose(config)
    prompts = [Prompt(caption, sample.seed + index) for index, (_, caption) in enumerate(chosen)]
    made = generate(run_dir, prompts, model_folder, sample, data.size)
    pairs = [Pair(real, caption, video.key) for (real, caption), video in zip(chosen, made, strict=True)]
    measured = _measure(run_dir, pairs, config, sample, data, networks)
    scores = {"inputs": inputs, "scores": measured.rows, "shapes": [], "left_out": measured.left_out, "notes": NOTES}
    if config.judge_shapes:
        said = {index: parse_caption(pairs[index].caption) for index in measured.seen}
        real, generated = zip(*measured.seen.values(), strict=True)
        judged = shapes(real, generated, list(said.values()), picture_only_colours, config.seed)
        storage.write_json(storage.join(run_dir, "scores", "confusion.json"), judged.confusion)
        scores |= {"shapes": judged.rows, "notes": [*NOTES, *filter(None, [judged.refused])]}
    storage.write_json(path, scores)
    print(table(scores))
    return scores


def choose(config: EvaluateConfig) -> list[tuple[str, str]]:
    """(path, caption) of `config.clips` test clips, with one of each one's captions, drawn by `config.seed`.

    The draw does not depend on the order of the manifest's rows. `beside` tells what its paths are relative to.
    """
    assert config.test is not None
    captions: dict[str, list[str]] = {}
    for batch in read_manifest(config.test, config.columns):
        for row in batch.to_pylist():
            captions.setdefault(row["url"], []).append(row["caption"])
    if len(captions) < config.clips:
        raise ValueError(f"evaluate.clips: {config.clips} are asked for, but {config.test} has {len(captions)}")
    rng = np.random.default_rng(config.seed)
    paths = rng.choice(sorted(captions), config.clips, replace=False).tolist()
    return [(beside(config.test, path), str(rng.choice(sorted(captions[path])))) for path in paths]


def table(scores: dict[str, Any]) -> str:
    """The scores as text: distances and alignment, then the shapes scores, then what to know about them."""
    lines = _aligned(scores["scores"], ["score", "of", "against", "clips", "value", "network", "network_id"])
    lines += _aligned(scores["shapes"], ["of", "against", "clips", *Fields._fields, "all"])
    lines += [f"left out: {clip['path']} ({clip['reason']})" for clip in scores["left_out"]]
    return "\n".join([*lines, *scores["notes"], f"Clips and captions were drawn with seed {scores['inputs']['seed']}."])


def _inputs(
    config: EvaluateConfig, sample: SampleConfig, data: DataConfig, model_folder: str, colours: Sequence[str]
) -> dict[str, Any]:
    """All that the scores depend on, as JSON gives it back; settings that cannot work fail here."""
    if config.test is None:
        raise ValueError("evaluate.test is not set: give the path of a table of test clips and captions")
    if not storage.exists(config.test):
        raise FileNotFoundError(f"evaluate.test: there is no file {config.test}")
    if config.clips < _FEWEST:
        raise ValueError(f"evaluate.clips: {config.clips} is too few, the controls need at least {_FEWEST}")
    if sample.frames != data.frames:
        raise ValueError(f"sample.frames: {sample.frames}, but real clips have data.frames: {data.frames}")
    return asdict(config) | {
        "test_digest": storage.digest(config.test),
        "frames": data.frames,
        "real_fps": data.fps,
        "size": data.size,
        "model": model_id(model_folder),
        "sampler": sampler_settings(sample, data.size),
        "sample_seed": sample.seed,
        "picture_only_colours": sorted(colours),
    }


def _networks(config: EvaluateConfig) -> Mapping[str, tuple[str, str]] | None:
    """Name and id of each network, found before any time is spent on videos; None where none is asked for."""
    if config.networks == "none":
        return None
    from t2v.standins import identities

    return identities()


class _Measured(NamedTuple):
    """Rows of scores, what the judge saw of each readable pair (real, generated), and the pairs left out."""

    rows: list[Row]
    seen: dict[int, list[Fields]]
    left_out: list[dict[str, str]]


def _measure(
    run_dir: str,
    pairs: list[Pair],
    config: EvaluateConfig,
    sample: SampleConfig,
    data: DataConfig,
    networks: Mapping[str, tuple[str, str]] | None,
) -> _Measured:
    import ray

    totals = NetworkScores(networks) if networks else None
    texts: Any = embed_texts([pair.caption for pair in pairs]) if networks else None
    seen, left_out = {}, []
    for done, features in enumerate(extract(run_dir, pairs, config, sample, data), 1):
        print(f"[evaluate] {done}/{len(pairs)} clips", flush=True)
        if features.error:
            left_out.append({"path": pairs[features.index].real, "reason": features.error})
            continue
        seen[features.index] = features.seen
        if totals:
            totals.add(features, class_vectors=ray.get(texts)[1])
    if len(seen) < _FEWEST:
        raise ValueError(f"evaluate.test: only {len(seen)} of {len(pairs)} clips can be read; {left_out[0]}")
    rows = totals.rows(ray.get(texts)[0], config.seed) if totals else []
    return _Measured(rows, dict(sorted(seen.items())), left_out)


def _aligned(rows: list[Row], columns: list[str]) -> list[str]:
    if not rows:
        return []
    cells = [columns, *([_cell(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
