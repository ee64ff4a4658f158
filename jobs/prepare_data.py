"""URL lists -> latent shards, a ledger of every row, and the funnel.

    ray job submit --working-dir . -- python jobs/prepare_data.py --config jobs/configs/nano.yaml

A run with a corpus of its own (`corpus` in the configuration) makes it first and serves it on loopback meanwhile.
`--status` tells how far a run is, `--verify` reads all that is finished again and queues what is damaged again.
"""

import sys
from dataclasses import asdict

from jobs.config import Config, job, parse, parser


def main() -> None:
    jobs_parser = parser(__doc__)
    jobs_parser.add_argument("--status", action="store_true", help="print the funnel so far, from storage alone")
    jobs_parser.add_argument(
        "--verify", action="store_true", help="read all finished shards again; 1 if any is damaged"
    )
    config, asked = parse(jobs_parser)
    if asked.status or asked.verify:
        return _look(config, asked.verify)
    with job("prepare_data", config):
        from pipelines.corpus import own_corpus
        from pipelines.prepare import prepare
        from t2v import storage

        with own_corpus(config.run_dir, config.corpus):
            prepare(config.run_dir, config.data, config.model.vae, config.seed)
        funnel = storage.read_json(storage.join(config.run_dir, "data", "funnel.json"))
        recorded = storage.join(config.run_dir, "config", "prepare_data.recorded.json")  # what MLflow has
        if (not storage.exists(recorded) or storage.read_json(recorded) != funnel) and _record(config, funnel):
            storage.write_json(recorded, funnel)


def _look(config: Config, verifies: bool) -> None:
    """What is there; FileNotFoundError ends the process as it does a job."""
    try:
        if verifies:
            from pipelines.verify import verify

            raise SystemExit(1 if verify(config.run_dir) else 0)
        from pipelines.status import show_status

        show_status(config.run_dir)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _record(config: Config, funnel: dict) -> bool:
    """Whether MLflow has taken all of it."""
    from pipelines.prepare import stored_plans
    from pipelines.sheet import sheet_path
    from t2v import storage
    from t2v.record import Record

    record = Record(config.run_dir, "prepare_data", asdict(config.data))
    data_dir = storage.join(config.run_dir, "data")
    for plan in stored_plans(data_dir):
        source = getattr(config.data, plan.stream).manifest
        sheet = sheet_path(data_dir, plan.stream)
        if storage.is_local(sheet) and storage.exists(sheet):
            record.file(sheet, "sheets")
        record.dataset(f"{plan.stream} manifest", source, plan.manifest.digest, plan.manifest.rows)
    record.table(
        [
            {"stream": stream, "status": status, "rows": count}
            for stream, counts in funnel.items()
            for status, count in counts["status"].items()
        ],
        "funnel.json",
    )
    record.metrics({f"yield_percent_{stream}": counts["yield_percent"] for stream, counts in funnel.items()}, step=0)
    return record.close()


if __name__ == "__main__":
    main()
