"""Bytes on disk -> a batch on the device.

sets.py says what there is, from index.py (folders), imagenet.py, shards.py or demo.py; sampler.py which image comes
when and to whom; augment.py what happens to it; decode.py and fill.py turn its bytes into pixels; prefetch.py does so
ahead of the step; loader.py, the only one that needs torch, copies them to the device. packing/ makes shards.
"""
