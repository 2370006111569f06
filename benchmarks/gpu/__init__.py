"""Quire on one GPU: figures beside the roofline of the same card, measured in the same run.

    python -m benchmarks.gpu --parts exactness,attention,experts,tune,0.6b,8b --out rows.jsonl
    python -m benchmarks.gpu --rehearse --parts 0.6b       the same code on a CPU, small; its rows are no figures

Needs torch, triton and what engine, kernels and schemas import; no network and no weights, which are random and
made on the device. `roofline` is what a step cannot beat: bytes that it has to read over the bandwidth of a large
copy, and operations over the rate of a large bf16 product, both measured here.

    device      the card or, in a rehearsal, the processor: memory, clocks, times, who computes when
    workloads   models by their shapes, lengths of requests, and how much of them a rehearsal does
    bench       one engine with random weights, and what its host does
    figures     decode, prefill, offline, memory
    profile     where the time of a step goes
    peers       transformers: one at a time, static batches, continuous batching
    against     Quire and its peers in turns, on the same requests
    alone       attention by itself;  products, experts: these
    table       rows beside what is aimed at
"""
