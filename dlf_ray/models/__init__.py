"""One model at work: plans in, rows of logits out. Only here does inference say transformers.

`loading` makes a model of a folder, a hub id or a GGUF file: `files` and `gguf` know whether those
are whole, `vocabulary` whether the tokenizers of two go together, `merging` puts an adapter into
the weights of its base, `adapters` several over one copy of them. `cache` holds the keys and values
of many sequences, `memory` knows what may still be taken, `runner` computes a plan under
transformers; `vllm_runner` does it under vLLM, `vllm_extension` in the processes of that, with the
`blocks` of its cache. `worker` is the loop around either. `inspect` tells what can be known of a
model without its weights, as `facts`, once `hub` has found it. What a worker's process imports of
the package is this room and the ground under it.
"""
