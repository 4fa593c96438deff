"""What a user would pick instead: the same model in PyTorch, compiled, and its attention.

    python benchmarks/torch_llama.py '{"part": "training", "size": [12, 1024, 16, 4], "context": 8192}'

Started by `accelerator.py` with the Python that has torch; prints one JSON list of rows. Llama as it
is written everywhere: RMSNorm, RoPE, SwiGLU, scaled_dot_product_attention, which takes cuDNN or
FlashAttention by the device, tied tables, AdamW fused, bfloat16 by autocast over float32 parameters, torch.compile.
"""

import contextlib
import itertools
import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

WARM, TIMED = 3, 5
SAMPLE_SECONDS = 0.005  # of attention: as many calls in a row as last that long


class Layer(nn.Module):
    def __init__(self, d, n_h, n_kv, head_dim):
        super().__init__()
        self.n_h, self.n_kv, self.head_dim = n_h, n_kv, head_dim
        d_ff = -(-8 * d // 3 // 32) * 32
        self.norms = nn.ModuleList(nn.RMSNorm(d, eps=1e-6) for _ in range(2))
        self.q, self.o = (
            nn.Linear(*s, bias=False) for s in ((d, n_h * head_dim), (n_h * head_dim, d))
        )
        self.kv = nn.Linear(d, 2 * n_kv * head_dim, bias=False)
        self.gate_up, self.down = nn.Linear(d, 2 * d_ff, bias=False), nn.Linear(d_ff, d, bias=False)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        h = self.norms[0](x)
        q = self.q(h).view(B, T, self.n_h, self.head_dim).transpose(1, 2)
        k, v = self.kv(h).view(B, T, 2, self.n_kv, self.head_dim).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        x = x + self.o(o.transpose(1, 2).reshape(B, T, -1))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotate(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(torch.bfloat16)


class Llama(nn.Module):
    def __init__(self, L, d, n_h, n_kv, head_dim=64, vocab=50304):
        super().__init__()
        self.remat, self.head_dim = False, head_dim
        self.embed = nn.Embedding(vocab, d)
        self.layers = nn.ModuleList(Layer(d, n_h, n_kv, head_dim) for _ in range(L))
        self.norm = nn.RMSNorm(d, eps=1e-6)
        nn.init.normal_(self.embed.weight, std=d**-0.5)

    def forward(self, tokens, targets):
        x = self.embed(tokens).to(torch.bfloat16)
        pair = torch.arange(0, self.head_dim, 2, device=x.device)
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * 500000.0 ** (
            -pair / self.head_dim
        )
        cos, sin = angle.cos(), angle.sin()
        for layer in self.layers:
            run = (
                (lambda *a, f=layer: checkpoint(f, *a, use_reentrant=False))
                if self.remat
                else layer
            )
            x = run(x, cos, sin)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def training(size, context, device="cuda", tokens=2**16, **model):
    """The fastest that fits: what the backward pass needs is kept where memory has room for it, and
    as many sequences at a time as it has room for."""
    tokens = max(tokens, context)
    torch.manual_seed(0)
    with torch.device(device):
        llama = Llama(*size, **model)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-4, fused=device == "cuda")
    vocab = llama.embed.num_embeddings
    data = torch.randint(vocab, (tokens // context, context + 1), device=device)
    counts = [n for n in (8, 4, 2, 1) if n <= len(data)]
    for llama.remat, rows in itertools.product((False, True), counts):
        found = _tried(llama, optimizer, data, rows, context, device)
        if found is not None:
            return found
        # out here nothing holds the arrays of what failed any more
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    return [{"what": "PyTorch", "note": "does not fit"}]


def _tried(llama, optimizer, data, rows, context, device):
    """Rows of so many sequences at a time; None where memory has no room for them."""
    compiled = llama
    if device == "cuda":  # each attempt for its own shapes
        torch.compiler.reset()
        compiled = torch.compile(llama, dynamic=False)
    try:
        return _timed(llama, compiled, optimizer, data, rows, context, device)
    except torch.cuda.OutOfMemoryError:
        return None


def _timed(llama, compiled, optimizer, data, rows, context, device):
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for i in range(WARM + TIMED):
        _wait(device)
        start = time.perf_counter()
        for part in data.split(rows):
            with torch.autocast(device, torch.bfloat16):
                loss = compiled(part[:, :-1], part[:, 1:])
            (loss * len(part) / len(data)).backward()
        nn.utils.clip_grad_norm_(compiled.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(device)
        if i >= WARM:
            seconds.append(time.perf_counter() - start)
    rate = len(data) * context / sorted(seconds)[len(seconds) // 2]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    layer = llama.layers[0]
    kernel = default_kernel(rows, layer.n_h, layer.n_kv, context, layer.head_dim, device)
    remat = "each layer" if llama.remat else "none"
    note = f"torch {torch.__version__}, {kernel}, remat {remat}, {rows} sequences at a time, "
    note += f"loss {loss.item():.2f}"
    return [{"what": "PyTorch", "tokens_per_second": rate, "GiB": peak, "note": note}]


def _wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def _operands(B, n_h, n_kv, T, head_dim, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = ((B, n_h, T, head_dim), *2 * ((B, n_kv, T, head_dim),))
    return [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes]


def default_kernel(B, n_h, n_kv, T, head_dim, device):
    """What scaled_dot_product_attention takes where it is free to choose, such as CUDNN_ATTENTION."""
    xs = _operands(B, n_h, n_kv, T, head_dim, device)
    return SDPBackend(torch._fused_sdp_choice(*xs, is_causal=True, enable_gqa=True)).name


def speed(head_dim=64, device="cuda", contexts=(2048, 8192, 32768), n_kv=8, group=3):
    """FlashAttention, and what PyTorch takes by default."""
    rows = []
    for T in contexts:
        shape = 1, n_kv * group, n_kv, T, head_dim, device
        default = f"PyTorch's default ({default_kernel(*shape)})"
        for name, chosen in (
            ("FlashAttention (PyTorch)", sdpa_kernel(SDPBackend.FLASH_ATTENTION)),
            (default, contextlib.nullcontext()),
        ):
            with chosen:
                times = _attention_times(_operands(*shape), device)
            what = f"{name}, T {T:,}, d_h {head_dim}, heads {n_kv}x{group}"
            rows.append({"what": what, **times})
    return rows


def _attention_times(xs, device):
    """Milliseconds of the forward pass, and of forward and backward."""

    def forward():
        return F.scaled_dot_product_attention(*xs, is_causal=True, enable_gqa=True)

    def both():
        torch.autograd.grad(forward().float().square().sum(), xs)

    return {
        "forward": _milliseconds(forward, device),
        "both": _milliseconds(both, device),
    }


def _milliseconds(f, device):
    """Of a call, the median of samples; several calls in a row, so that starting them does not count."""

    def sample(calls):
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            f()
        _wait(device)
        return time.perf_counter() - start

    sample(2)
    calls = 1
    while sample(calls) < SAMPLE_SECONDS:
        calls *= 2
    samples = sorted(sample(calls) / calls for _ in range(11 if device == "cuda" else 1))
    return 1e3 * samples[len(samples) // 2]


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_float32_matmul_precision("high")
    print(json.dumps({"training": training, "speed": speed}[asked.pop("part")](**asked)))
