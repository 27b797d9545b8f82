"""Bytes on disk -> a batch on the device.

sets.py says what there is, from index.py (folders), imagenet.py, shards.py or demo.py; sampler.py which image comes
when and to whom; augment.py what happens to it; decode.py and fill.py turn its bytes into pixels; loader.py does so
ahead of the step, and is the only one that needs torch. packing/ makes shards.
"""
