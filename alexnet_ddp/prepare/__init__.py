"""From images as they came to packed, shuffled, verified shards: `python -m alexnet_ddp.prepare`.

A shard is a pure function of its row of the plan and of the recipe, so any engine, any number of workers, any retry
and any restart write the same bytes. source.py lists, plan.py says which image goes where, encode.py and write.py make
a shard, commit.py verifies and puts the index last. local.py and spark.py (with spark_tasks.py and java.py) are the
engines. Nothing here needs torch.
"""
