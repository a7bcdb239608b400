"""Filter a corpus with datatrove: C4's and Gopher's quality rules, then near duplicates by MinHash.

    pip install -e ".[datatrove]"
    python examples/datatrove_filters.py CORPUS OUT --workers 16
    llamafactory-ddm prepare-data x.yaml sources=OUT/kept

CORPUS is a folder of parquet files with a column `text`, or its URL, such as
hf://datasets/HuggingFaceFW/fineweb/sample/10BT. OUT/kept gets parquet files with the same columns, `id` and
`file_path`, OUT/dropped the documents that each filter drops, as JSON lines, and the rest of OUT holds intermediate
results. C4's rules also delete lines from the documents that they keep. The same command with the same number of
workers resumes an interrupted run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter


def main() -> None:
    """Read the command line and run the stages, each of which needs the whole result of the one before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="folder of parquet files, or its URL")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    options = parser.parse_args()
    config = MinhashConfig()
    good, signatures, buckets, clusters, kept = (
        str(options.out / name) for name in ("good", "signatures", "buckets", "clusters", "kept")
    )

    def run(name: str, steps: list[PipelineStep], tasks: int = options.workers) -> None:
        logs = str(options.out / "logs" / name)
        LocalPipelineExecutor(steps, tasks=tasks, workers=options.workers, logging_dir=logs).run()

    def dropped(name: str) -> JsonlWriter:
        return JsonlWriter(str(options.out / "dropped" / name))

    def columns(folder: str) -> ParquetWriter:
        # Else all columns but text and id are in one, `metadata`, which `filters` of prepare-data cannot read.
        return ParquetWriter(folder, expand_metadata=True)

    filters = [
        C4QualityFilter(exclusion_writer=dropped("c4")),
        GopherQualityFilter(exclusion_writer=dropped("gopher")),
    ]
    run("filters", [ParquetReader(options.corpus), *filters, columns(good)])
    run("signatures", [ParquetReader(good), MinhashDedupSignature(signatures, config)])
    run("buckets", [MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets)
    run("clusters", [MinhashDedupCluster(buckets, clusters, config)], 1)
    run("duplicates", [ParquetReader(good), MinhashDedupFilter(clusters, dropped("minhash")), columns(kept)])


if __name__ == "__main__":
    main()
