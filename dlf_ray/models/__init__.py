"""One model at work: plans in, rows of logits out. Only here does inference say transformers.

`loading` makes a model of a folder or a hub id, `cache` holds the keys and values of many
sequences, `memory` knows what may still be taken, `runner` computes a plan, `worker` is the loop
around it. What a worker's process imports of the package is this room and the ground under it.
"""
