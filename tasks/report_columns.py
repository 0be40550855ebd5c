"""What the tables of a report show: for each column its title, where its figure stands in `report.json`, and how it is written."""

from __future__ import annotations

from typing import NamedTuple


class Column(NamedTuple):
    label: str
    path: str  # dotted
    form: str = "number"
    help: str = ""
    optional: bool = False  # without any value, it is named under "not run" instead of filling a column
    source: str = ""  # beside the value: how it was come by, shown with it where that is an estimate


VARIANT_COLUMNS = [
    Column("Exact match", "quality.exact_match", "percent", "Right intent and all slots right; 95% interval"),
    Column("Hard exact match", "quality.hard_exact_match", "percent", "The same on unseen patterns, with more noise"),
    Column("Intent accuracy", "quality.intent_accuracy", "percent", "Right intent, whatever the slots"),
    Column("JSON valid", "quality.json_valid", "percent", "Share of answers that can be read"),
    Column("Size, MB", "size_mb", "number", "Size on disk"),
    Column("Bits", "bits", "number", "Bits per weight"),
    Column("Load, s", "performance.load_s", "number", "Time until the model can answer, once its runtime's libraries are imported"),
    Column("Latency p50, ms", "performance.latency_ms.p50", "number", "Half of the requests take at most this long"),
    Column("Latency p95, ms", "performance.latency_ms.p95", "number", "95 of 100 requests take at most this long"),
    Column("Prefill, tok/s", "performance.prefill_tok_s", "number", "Speed of reading the prompt"),
    Column("Decode, tok/s", "performance.decode_tok_s", "number", "Speed of writing the answer"),
    Column("Requests/s", "performance.requests_s", "number", "One request at a time"),
    Column("Requests/s, batched", "performance.requests_s_batched", "number", "Several requests at once"),
    Column("RSS, MB", "performance.rss_mb", "number", "Memory of the process while it answers, one or several at once"),
    Column("Private, MB", "performance.private_mb", "number", "Memory that the process shares with no other"),
    Column("Speedup", "speedup_vs_fp16", "ratio", "Times as fast as the 16-bit reference, both one request at a time"),
    Column("Speedup, batched", "speedup_vs_fp16_batched", "ratio", "The same, both several at once"),
    Column("Batched against alone", "batched_vs_fp16_alone", "ratio", "Several at once, against the 16-bit reference one at a time"),
    Column("RAM reduction", "ram_reduction_vs_fp16", "percent", "Memory saved against the 16-bit reference"),
    Column("Private reduction", "private_reduction_vs_fp16", "percent", "The same of private memory"),
    Column("VRAM reduction", "vram_reduction_vs_fp16", "percent", "The same of a GPU's memory", optional=True),
    Column("VRAM, MB", "performance.vram_mb", "number", "Memory on the GPU", optional=True),
    Column("Energy, J per request", "performance.energy_j_per_request", "number", "One request at a time", True, "energy_source"),
    Column("USD per 1,000 requests", "performance.usd_per_1k_requests", optional=True),
]
FIDELITY_COLUMNS = [
    Column("Verdict", "fidelity.verdict", "text", "What all checks together say"),
    Column("Change, points", "quality.vs_reference.delta", "points", "Exact match minus the reference's; 95% interval"),
    Column("McNemar p", "quality.vs_reference.mcnemar_p", "number", "How often chance alone gives such a change"),
    Column("Same next token", "fidelity.top1_agreement", "percent", "How often both prefer the same token", True),
    Column("Mean KLD", "fidelity.mean_kld", "number", "Divergence of the token probabilities; 0 is none", True),
    Column("p99 KLD", "fidelity.p99_kld", "number", "99 of 100 tokens diverge less than this", True),
    Column("Perplexity", "fidelity.perplexity", "number", "Of the right answers: the number of tokens it hesitates between", True),
    Column("Weight error", "fidelity.weight_rel_error", "percent", "Relative error of the weights", True),
    Column("Fine-tuning kept", "fidelity.delta_retained", "percent", "What is left of the change by fine-tuning", True),
    Column("Same prompt", "fidelity.prompt_ids_match", "text", "Both read the same prompt tokens", True),
]
CONTENT_COLUMNS = [
    Column("Bits per weight", "bits", "number", "Over all weights of the file, scales included"),
    Column("Tensors by type", "tensor_types", "text", "What the file really holds: llama.cpp falls back where a dimension does not fit"),
]
CONSTRAINED_COLUMNS = [
    Column("Exact match, free", "quality.exact_match", "percent"),
    Column("Exact match, constrained", "constrained.exact_match", "percent"),
    Column("Change, points", "constrained.vs_free.delta", "points", "Constrained minus free; 95% interval"),
    Column("McNemar p", "constrained.vs_free.mcnemar_p", "number", "How often chance alone gives such a change"),
    Column("Readable, free", "quality.json_valid", "percent"),
    Column("Readable, constrained", "constrained.json_valid", "percent"),
    Column("Requests/s, free", "performance.requests_s"),
    Column("Requests/s, constrained", "constrained.requests_s", "number", "Of one process, whatever the number of runs"),
    Column("Batched, free", "performance.requests_s_batched"),
    Column("Batched, constrained", "constrained.requests_s_batched", "number", "Of one process, whatever the number of runs"),
]
MEASURED_COLUMNS = [
    Column("Runs", "performance.runs", "number", "Fresh processes, variants taking turns"),
    Column("Spread of requests/s", "performance.spread.requests_s", "percent", "Largest minus smallest of the runs, by their median", True),
    Column("Spread of decode", "performance.spread.decode_tok_s", "percent", "The same for tokens written a second", True),
    Column("First token p50, ms", "performance.ttft_ms.p50", "number", "From the request to its first token"),
    Column("Later token p50, ms", "performance.tpot_ms.p50", "number", "Mean time of each token after the first"),
    Column("Latency p99, ms", "performance.latency_ms.p99"),
    Column("Layer class", "kernel", "text", "What computes the quantized layers in transformers", True),
    Column("Peak RSS, MB", "performance.peak_rss_mb", "number", "The most it ever had, from loading to the answers several at once"),
    Column("PSS, MB", "performance.pss_mb", "number", "Memory, what is shared with other processes divided among them", True),
    Column(
        "Batched, prefix not shared",
        "performance.requests_s_prefix_not_shared",
        "number",
        "Requests/s when each prompt is read as a whole",
        True,
    ),
    Column(
        "Mapped: load, s",
        "performance.mapped.load_s",
        "number",
        "With the file mapped into memory instead of read; of one process, whatever the number of runs",
        True,
    ),
    Column("Mapped: RSS, MB", "performance.mapped.rss_mb", "number", "", True),
    Column("Mapped: private, MB", "performance.mapped.private_mb", "number", "", True),
    Column("Mapped: requests/s", "performance.mapped.requests_s", "number", "", True),
    Column(
        "Prefill, share of llama-bench's",
        "performance.llama_bench.prefill_ratio",
        "ratio",
        "Our figure as a share of llama-bench's on the same file",
        True,
    ),
    Column(
        "Decode, share of llama-bench's",
        "performance.llama_bench.decode_ratio",
        "ratio",
        "Our figure as a share of llama-bench's on the same file",
        True,
    ),
]
KERNEL_COLUMNS = [
    Column("Layer class", "kernel", "text"),
    Column("Requests/s", "requests_s"),
    Column("Batched", "requests_s_batched"),
    Column("Prefill, tok/s", "prefill_tok_s"),
    Column("Decode, tok/s", "decode_tok_s"),
]
GATE = [Column("Champion", "champion"), Column("Challenger", "challenger"), Column("Change, points", "delta", "points"),
        Column("Lower bound, points", "low", "points"), Column("Margin, points", "margin", "points")]  # fmt: skip
TILES = [c for c in VARIANT_COLUMNS if c.label in ("Exact match", "Size, MB", "Speedup", "RAM reduction")]
DATA = [Column("Duplicates removed", "duplicates_removed"),
        Column("Nearly evaluation rows, removed", "near_duplicates_removed"), Column("Teacher", "teacher"), Column("SHA-256", "sha256")]  # fmt: skip
TRAINING = [
    Column("Base model", "base_model"), Column("Vocabulary, tokens", "vocabulary"), Column("Examples", "examples"), Column("Epochs", "epochs"),
    Column("Tokens", "tokens"), Column("Tokens per second", "tokens_per_s"), Column("Time", "wall_s", "time"),
    Column("Peak memory, MB", "peak_rss_mb"), Column("Trainable parameters", "trainable_params"),
    Column("Final loss", "final_loss", "number", "Of the last steps, with the weight of the intent"),
]  # fmt: skip
MACHINE = [Column(*c) for c in (("Processor", "cpu"), ("Instructions", "instructions", "text"), ("Cores", "cores"), ("RAM, GB", "ram_gb"), ("GPU", "gpu"), ("Python", "python"),
                                  ("Speed measured on", "measured_on", "text"))]  # fmt: skip
STAGES = [Column("State", "state", "text"), Column("Time", "wall_s", "time"), Column("Pool", "pool", "text"), Column("Key", "key", "text")]
OVERHEAD = [Column("Time", "seconds", "time"), Column("Share", "share", "percent")]
PAPER = [Column(key.title(), key, "text") for key in ("paper", "ours", "comparable", "note")]
