"""Latent shards, or raw ones -> the trained UNet, as checkpoints and as a diffusers folder; rerunning it resumes.

ray job submit --working-dir . -- python jobs/train.py --config jobs/configs/nano.yaml
"""

from contextlib import nullcontext
from functools import partial

from jobs.config import Config, job, parse, parser
from jobs.corpus import own_corpus


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--dry_run", action="store_true", help="say what a run would do, try a step, train nothing")
    config, given = parse(arguments)
    with job("train", config):
        if _trained_samples(config) >= config.train.samples:
            print(f"[train] nothing to do: {config.run_dir}/train/model has seen {config.train.samples:,} samples")
            return
        with own_corpus(config) if config.train.feed == "online" else nullcontext():
            _train(config, given.dry_run)


def _train(config: Config, dry: bool) -> None:
    from dashboards.milestones import milestones_page
    from pipelines.preview import start_preview
    from pipelines.sampling import check_steps
    from t2v.job import TrainJob
    from t2v.worker import fit

    encode, raw = None, None
    if config.train.feed == "online":
        from pipelines.online import open_online

        encode, raw = open_online(config.run_dir, config.data, config.model.vae, config.seed)
    train_job = TrainJob(
        run_dir=config.run_dir,
        seed=config.seed,
        size=config.data.size,
        frames=config.data.frames,
        model=config.model,
        diffusion=config.diffusion,
        train=config.train,
        sample=config.sample,
        raw=raw,
    )
    check_steps(config.sample, config.diffusion)  # which samples along the way take
    if dry:
        from t2v.checks import dry_run

        dry_run(train_job)
    else:
        fit(train_job, partial(start_preview, page=milestones_page), encode)


def _trained_samples(config: Config) -> int:
    from t2v import storage

    path = storage.join(config.run_dir, "train", "model", "t2v.json")
    return storage.read_json(path)["info"]["samples"] if storage.exists(path) else 0


if __name__ == "__main__":
    main()
