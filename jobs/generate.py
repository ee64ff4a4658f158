"""A file of prompts (txt, csv, jsonl, parquet) -> mp4 files and a manifest; a rerun makes what is missing.

ray job submit --working-dir . -- python jobs/generate.py --config jobs/configs/nano.yaml --prompts prompts.txt
"""

from jobs.config import job, parse, parser


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--prompts", type=str, required=True, help="one prompt a line, or a column `prompt`")
    arguments.add_argument("--model_folder", type=str | None, help="a diffusers folder; the run's own model by default")
    config, given = parse(arguments)
    with job("generate", config):
        from pipelines.sampling import generate

        model = given.model_folder or f"{config.run_dir}/train/model"
        generate(config.run_dir, given.prompts, model, config.sample, config.data.size)
        print(f"[generate] videos and manifest.jsonl in {config.run_dir}/samples", flush=True)


if __name__ == "__main__":
    main()
