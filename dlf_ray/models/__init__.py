"""One model at work: plans in, rows of logits out. Only here does inference say transformers.

`loading` makes a model of a folder or a hub id, `vocabulary` tells whether the tokenizers of two
models go together, `adapters` puts LoRA adapters over a model's weights, `cache` holds the keys and
values of many sequences, `memory` knows what may still be taken, `runner` computes a plan under
transformers; `vllm_runner` does it under vLLM, `vllm_extension` in the processes of that, with the
`blocks` of its cache. `worker` is the loop around either, `inspect` tells what can be known of a
model without its weights. What a worker's process imports of the package is this room and the
ground under it.
"""
