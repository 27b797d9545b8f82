"""Bytes on disk -> a batch on the device.

sets.py says what there is, from index.py (folders), imagenet.py, shards.py or demo.py; sampler.py which image comes
when and to whom; augment.py what happens to it. decode.py, policy.py and fill.py turn its bytes into pixels;
prefetch.py does so ahead of the step; loader.py copies them to the device, where effects.py changes whole batches.
packing/ makes shards. Only loader.py and effects.py need torch at once.
"""
