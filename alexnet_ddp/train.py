"""Train an image classifier with DistributedDataParallel, or resume a run.

    torchrun --nproc_per_node=8 -m alexnet_ddp.train experiment=alexnet data.root=/data/imagenet

The loop is in training/trainer.py, a step in training/step.py.
"""

if __name__ == "__main__":
    from alexnet_ddp.runtime import startup

    startup.begin("train")  # before the other imports

    from alexnet_ddp import cli

    cli.run("train", "alexnet_ddp.training.trainer:train")
