"""Packs images into shuffled, verified shards: `python -m alexnet_ddp.prepare`.

A shard depends only on its row of the plan and on the recipe. Every engine, any number of workers,
every retry and every restart therefore write the same bytes.

sources.py lists the images and plan.py assigns them to shards. encode.py and write.py make one
shard. commit.py checks all shards and writes the index last. engine.py and spark.py (with
spark_tasks.py and java.py) run the work. checks.py refuses what cannot succeed, report.py prints
what finished shards contain. Only sheet.py needs torch.
"""
