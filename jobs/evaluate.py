"""A trained model and real test clips -> scores, each with its controls.

ray job submit --working-dir . -- python jobs/evaluate.py --config jobs/configs/nano.yaml
"""

from dataclasses import asdict

from jobs.config import job, parse, parser


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model_folder", type=str | None, help="a diffusers folder; the run's own model by default")
    config, given = parse(arguments)
    with job("evaluate", config):
        from pipelines.scoring import evaluate
        from t2v import storage

        path = storage.join(config.run_dir, "scores", "scores.json")
        before = storage.read_json(path) if storage.exists(path) else None
        model = given.model_folder or f"{config.run_dir}/train/model"
        colours = config.corpus.picture_only_colours if config.corpus else ()
        scores = evaluate(config.run_dir, config.evaluate, config.sample, config.data, model, colours)
        if scores != before:
            from t2v.record import Record

            record = Record(config.run_dir, "evaluate", asdict(config.evaluate) | {"sample": asdict(config.sample)})
            record.table(scores["scores"] + scores["shapes"], "scores.json")
            record.close()


if __name__ == "__main__":
    main()
