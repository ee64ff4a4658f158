"""Latent shards, or raw ones -> the trained UNet, as checkpoints and as a diffusers folder; rerunning it resumes.

ray job submit --working-dir . -- python jobs/train.py --config jobs/configs/nano.yaml
"""

from contextlib import ExitStack
from functools import partial

from jobs.config import job, parse, parser


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--dry_run", action="store_true", help="say what a run would do, try a step, train nothing")
    config, given = parse(arguments)
    with job("train", config), ExitStack() as meanwhile:
        from t2v.job import TrainJob

        train_job = TrainJob(
            run_dir=config.run_dir,
            seed=config.seed,
            size=config.data.size,
            frames=config.data.frames,
            model=config.model,
            diffusion=config.diffusion,
            train=config.train,
            sample=config.sample,
        )
        if train_job.exported_samples >= config.train.samples:
            print(f"[train] nothing to do: {train_job.model_folder} has seen {config.train.samples:,} samples")
            return
        from pipelines.sampling import check_steps

        check_steps(config.sample, config.diffusion)  # which samples along the way take
        encode = None
        if config.train.feed == "online":
            from pipelines.corpus import own_corpus
            from pipelines.online import open_online

            meanwhile.enter_context(own_corpus(config.run_dir, config.corpus))
            encode, train_job.raw = open_online(config.run_dir, config.data, config.model.vae, config.seed)
        if given.dry_run:
            from t2v.checks import dry_run

            dry_run(train_job)
        else:
            from dashboards.milestones import milestones_page
            from pipelines.preview import start_preview
            from t2v.worker import fit

            fit(train_job, partial(start_preview, page=milestones_page), encode)


if __name__ == "__main__":
    main()
