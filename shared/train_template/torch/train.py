"""Train one GPT for a fixed time and score it once. This is the file that the agent edits; all else is fixed.

    python train.py          (budget, seed and profile come from the environment; see program.md)

Everything from architecture to schedule may change, as long as it runs, prints the summary block and imports nothing
beyond what is installed. The clock, the data and the metric belong to `prepare`.
"""

import gc
import math
import sys
import time
from dataclasses import dataclass

STARTED = time.perf_counter()

import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare.torch_backend import (
    DEVICE, MAX_SEQ_LEN, SEED, VOCAB_SIZE,
    clock, evaluate_bpb, load_tokenizer, make_dataloader, peak_flops, peak_memory_mb, synchronize,
)

if DEVICE.type == "cuda":
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

# ---------------------------------------------------------------------------------------------------------------------
# Hyperparameters

# Model
DEPTH = 8                     # layers
ASPECT_RATIO = 64             # width = DEPTH * ASPECT_RATIO, rounded up to a multiple of HEAD_DIM
HEAD_DIM = 128
WINDOW_PATTERN = "SSSL"       # one letter a layer, repeated: S = short window, L = whole context; the last layer is L
SHORT_WINDOW = 0.5            # short window, as a share of the sequence
MLP_RATIO = 4                 # hidden width of the MLP / width
ROPE_THETA = 10_000
QK_SCALE = 1.0                # factor on queries and keys after their norm
LOGIT_SOFTCAP = 15.0
VE_GATE_CHANNELS = 32         # channels of the stream that open the value-embedding gate
VE_GATE_RANGE = 2.0           # the gate is VE_GATE_RANGE * sigmoid(...)

# Initialisation
EMBED_INIT_STD = 1.0
LM_HEAD_INIT_STD = 0.001
MATRIX_INIT_SCALE = 1.0       # q, k, v, MLP input and value embeddings: uniform +- MATRIX_INIT_SCALE * sqrt(3 / width)
FC_INIT_SCALE = 1.0           # a further factor for the MLP's input matrix
PROJ_INIT_STD = 0.0           # matrices that write into the stream
RESID_LAMBDA_INIT = 1.0
X0_LAMBDA_INIT = 0.1

# Batch
TOTAL_BATCH_SIZE = 2**19      # tokens an optimizer step
DEVICE_BATCH_SIZE = 128       # rows a forward pass; gradients accumulate up to TOTAL_BATCH_SIZE

# Learning rates
EMBEDDING_LR = 0.6
UNEMBEDDING_LR = 0.004
MATRIX_LR = 0.04
SCALAR_LR = 0.5

# AdamW (embeddings, unembedding, scalars)
ADAM_BETA1 = 0.8
ADAM_BETA2 = 0.95
ADAM_EPS = 1e-10
X0_BETA1 = 0.96

# Muon (matrices)
NS_STEPS = 5                  # orthogonalisation steps
MUON_MOMENTUM = 0.95
MUON_MOMENTUM_START = 0.85
MUON_MOMENTUM_WARMUP_STEPS = 300
MUON_BETA2 = 0.95
MUON_NORM_FACTOR = 1.02
WEIGHT_DECAY = 0.2            # matrices only, cautious, decays to 0 with progress

# Schedule (shares of the time budget)
WARMUP_RATIO = 0.0
WARMDOWN_RATIO = 0.5
FINAL_LR_FRAC = 0.0

# Guards
MAX_LOSS = 100                # a loss above it has diverged
GC_EVERY_STEPS = 5000

# ---------------------------------------------------------------------------------------------------------------------
# Model

COMPILE = DEVICE.type == "cuda"  # elsewhere compiling costs more than a run of this length gains
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


@dataclass
class GPTConfig:
    vocab_size: int = VOCAB_SIZE
    max_seq_len: int = MAX_SEQ_LEN
    n_layer: int = DEPTH
    head_dim: int = HEAD_DIM
    n_embd: int = (DEPTH * ASPECT_RATIO + HEAD_DIM - 1) // HEAD_DIM * HEAD_DIM
    window_pattern: str = WINDOW_PATTERN

    @property
    def n_head(self):
        return self.n_embd // self.head_dim

    def windows(self):
        """Keys a query sees before its own position, per layer."""
        short = max(int(self.max_seq_len * SHORT_WINDOW), 1)
        sizes = [short if self.window_pattern[i % len(self.window_pattern)] == "S" else self.max_seq_len
                 for i in range(self.n_layer)]
        return sizes[:-1] + [self.max_seq_len]

    def has_value_embedding(self, layer):
        """Every other layer, the last one included."""
        return (self.n_layer - 1 - layer) % 2 == 0


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Rotary position: pairs (first half, second half) of each head's channels are turned by the position's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


_masks = {}


def window_mask(length, window):
    """What attention may see, cached by (length, window): a block mask on CUDA, a boolean matrix elsewhere."""
    key = (length, window)
    if key not in _masks:
        if DEVICE.type == "cuda":
            _masks[key] = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k <= window),
                                            None, None, length, length, device=DEVICE)
        else:
            distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
            _masks[key] = ((distance >= 0) & (distance <= window)).to(DEVICE)
    return _masks[key]


def attend(q, k, v, window):
    """Causal attention over the last `window` positions; q, k, v are (batch, heads, length, head_dim)."""
    length = q.size(2)
    if window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if DEVICE.type == "cuda":
        return flex_attention(q, k, v, block_mask=window_mask(length, window))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=window_mask(length, window))


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        width = config.n_embd
        self.n_head, self.head_dim, self.window = config.n_head, config.head_dim, config.windows()[layer]
        if self.window < config.max_seq_len:
            window_mask(config.max_seq_len, self.window)  # made here, outside the compiled graph
        self.c_q = nn.Linear(width, width, bias=False)
        self.c_k = nn.Linear(width, width, bias=False)
        self.c_v = nn.Linear(width, width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.gate_channels = min(VE_GATE_CHANNELS, width)
        self.ve_gate = nn.Linear(self.gate_channels, self.n_head, bias=False) if config.has_value_embedding(layer) else None

    def forward(self, x, ve, cos, sin):
        B, T, C = x.shape
        q, k, v = (c(x).view(B, T, self.n_head, self.head_dim) for c in (self.c_q, self.c_k, self.c_v))
        if self.ve_gate is not None:
            gate = VE_GATE_RANGE * torch.sigmoid(self.ve_gate(x[..., :self.gate_channels]))
            v = v + gate.unsqueeze(-1) * ve.view(B, T, self.n_head, self.head_dim)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        if QK_SCALE != 1.0:
            q, k = q * QK_SCALE, k * QK_SCALE
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.window)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, int(MLP_RATIO * config.n_embd), bias=False)
        self.c_proj = nn.Linear(int(MLP_RATIO * config.n_embd), config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, ve, cos, sin):
        x = x + self.attn(norm(x), ve, cos, sin)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tok_embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.embed_v = nn.ModuleDict({str(i): nn.Embedding(config.vocab_size, config.n_embd)
                                      for i in range(config.n_layer) if config.has_value_embedding(i)})
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        frequency = ROPE_THETA ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angle = torch.outer(torch.arange(config.max_seq_len).float(), frequency)
        self.register_buffer("cos", angle.cos()[None, :, None, :].to(DTYPE), persistent=False)
        self.register_buffer("sin", angle.sin()[None, :, None, :].to(DTYPE), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        s = MATRIX_INIT_SCALE * math.sqrt(3) * self.config.n_embd ** -0.5
        nn.init.normal_(self.tok_embed.weight, std=EMBED_INIT_STD)
        nn.init.normal_(self.lm_head.weight, std=LM_HEAD_INIT_STD)
        for block in self.blocks:
            for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                nn.init.uniform_(matrix.weight, -s, s)
            nn.init.uniform_(block.mlp.c_fc.weight, -s * FC_INIT_SCALE, s * FC_INIT_SCALE)
            for matrix in (block.attn.c_proj, block.mlp.c_proj):
                nn.init.normal_(matrix.weight, std=PROJ_INIT_STD)
            if block.attn.ve_gate is not None:
                nn.init.zeros_(block.attn.ve_gate.weight)
        for embedding in self.embed_v.values():
            nn.init.uniform_(embedding.weight, -s, s)
        self.resid_lambdas.fill_(RESID_LAMBDA_INIT)
        self.x0_lambdas.fill_(X0_LAMBDA_INIT)
        self.tok_embed.to(dtype=DTYPE)
        self.embed_v.to(dtype=DTYPE)

    def forward(self, tokens, targets=None):
        """Logits (batch, length, vocab), fp32; with targets, their mean cross-entropy in nats instead."""
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=DTYPE == torch.bfloat16):
            T = tokens.size(1)
            cos, sin = self.cos[:, :T], self.sin[:, :T]
            x = x0 = norm(self.tok_embed(tokens))
            for i, block in enumerate(self.blocks):
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
                ve = self.embed_v[str(i)](tokens) if str(i) in self.embed_v else None
                x = block(x, ve, cos, sin)
            logits = self.lm_head(norm(x)).float()
        logits = LOGIT_SOFTCAP * torch.tanh(logits / LOGIT_SOFTCAP)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def flops_per_token(self):
        """Forward and backward: 6 for each matrix parameter used, 12 x heads x head_dim x window for attention."""
        unused = sum(p.numel() for p in self.embed_v.parameters()) + self.tok_embed.weight.numel()
        scalars = self.resid_lambdas.numel() + self.x0_lambdas.numel()
        matrices = sum(p.numel() for p in self.parameters()) - unused - scalars
        return 6 * matrices + sum(12 * self.config.n_embd * min(w, MAX_SEQ_LEN) for w in self.config.windows())


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer

# Coefficients of the Polar Express polynomials (Amsel et al. 2025, arXiv:2505.16932), l = 1e-3, five steps, with the
# paper's safety margin; each step is X <- aX + (bA + cA^2)X with A = XX^T.
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def adamw_update(p, grad, m, v, lr, beta1, beta2, step, eps):
    m.lerp_(grad.to(m.dtype), 1 - beta1)
    v.lerp_(grad.to(v.dtype).square(), 1 - beta2)
    m_hat = m / (1 - beta1 ** step)
    v_hat = v / (1 - beta2 ** step)
    p.sub_((lr * m_hat / (v_hat.sqrt() + eps)).to(p.dtype))


def orthogonalise(g):
    """The nearest semi-orthogonal matrix to each of a stack, in bf16 where the device is fast at it."""
    x = g.to(DTYPE)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * MUON_NORM_FACTOR + 1e-6)
    for a, b, c in POLAR_EXPRESS[:NS_STEPS]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def muon_update(params, grads, momentum_buffer, second_moment, lr, momentum, beta2, weight_decay):
    """One step for a stack of equal shape, (n, rows, cols): Nesterov momentum, orthogonalisation, then NorMuon.

    The factored second moment evens the rows' (or columns') sizes out and keeps the norm of the whole update
    (arXiv:2510.05491); weight decay acts only where it agrees with the update's sign.
    """
    momentum_buffer.lerp_(grads, 1 - momentum)
    update = orthogonalise(grads.lerp(momentum_buffer, momentum)).float()
    along = -1 if update.size(-2) >= update.size(-1) else -2
    energy = update.square().mean(dim=along, keepdim=True)
    second_moment.lerp_(energy, 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    before = energy.sum(dim=(-2, -1), keepdim=True).sqrt()
    after = (energy * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    update = update * scale * (before / after.clamp_min(1e-10))
    agree = (update * params) >= 0
    params.sub_(lr * update + lr * weight_decay * params * agree)


if COMPILE:
    adamw_update = torch.compile(adamw_update, dynamic=False, fullgraph=True)
    muon_update = torch.compile(muon_update, dynamic=False, fullgraph=True)


class MuonAdamW(torch.optim.Optimizer):
    """AdamW for embeddings, unembedding and scalars; Muon for matrices, stacked by shape."""

    def __init__(self, model):
        scale = (model.config.n_embd / 768) ** -0.5
        adam = dict(kind="adamw", betas=(ADAM_BETA1, ADAM_BETA2))
        groups = [
            dict(adam, params=[model.lm_head.weight], lr=UNEMBEDDING_LR * scale),
            dict(adam, params=[model.tok_embed.weight], lr=EMBEDDING_LR * scale),
            dict(adam, params=list(model.embed_v.parameters()), lr=EMBEDDING_LR * scale),
            dict(adam, params=[model.resid_lambdas], lr=SCALAR_LR * 0.01),
            dict(adam, params=[model.x0_lambdas], lr=SCALAR_LR, betas=(X0_BETA1, ADAM_BETA2)),
        ]
        matrices = list(model.blocks.parameters())
        for shape in sorted({m.shape for m in matrices}):
            same = [m for m in matrices if m.shape == shape]
            groups.append(dict(kind="muon", params=same, lr=MATRIX_LR * max(1.0, shape[0] / shape[1]) ** 0.5))
        super().__init__(groups, {})
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    # Numbers that change from step to step travel as tensors, so that a compiled update is never compiled again.
    @staticmethod
    def _number(value):
        return torch.tensor(value, dtype=torch.float32)

    @torch.no_grad()
    def step(self, lr_factor, momentum, weight_decay):
        n = self._number
        for group in self.param_groups:
            lr = n(group["initial_lr"] * lr_factor)
            if group["kind"] == "muon":
                params = group["params"]
                state = self.state[params[0]]
                stacked, grads = torch.stack(params), torch.stack([p.grad for p in params])
                if not state:
                    rows, cols = stacked.shape[-2:]
                    state["momentum"] = torch.zeros_like(stacked)
                    state["second"] = stacked.new_zeros((len(params), rows, 1) if rows >= cols else (len(params), 1, cols))
                muon_update(stacked, grads, state["momentum"], state["second"], lr, n(momentum), n(MUON_BETA2),
                            n(weight_decay))
                torch._foreach_copy_(params, list(stacked.unbind(0)))
                continue
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"], state["m"], state["v"] = 0, torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                beta1, beta2 = group["betas"]
                adamw_update(p, p.grad, state["m"], state["v"], lr, n(beta1), n(beta2), n(state["step"]), n(ADAM_EPS))


def lr_factor(progress):
    if progress < WARMUP_RATIO:
        return progress / WARMUP_RATIO
    if progress <= 1 - WARMDOWN_RATIO:
        return 1.0
    left = (1 - progress) / WARMDOWN_RATIO
    return left + (1 - left) * FINAL_LR_FRAC


def muon_momentum(step):
    share = min(step / MUON_MOMENTUM_WARMUP_STEPS, 1.0)
    return MUON_MOMENTUM_START + share * (MUON_MOMENTUM - MUON_MOMENTUM_START)


# ---------------------------------------------------------------------------------------------------------------------
# Training

def main():
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    tokenizer = load_tokenizer()
    with torch.device(DEVICE):
        model = GPT(GPTConfig())
    num_params = sum(p.numel() for p in model.parameters())
    flops_per_token = model.flops_per_token()
    optimizer = MuonAdamW(model)
    net = torch.compile(model, dynamic=False) if COMPILE else model

    device_batch = min(DEVICE_BATCH_SIZE, max(TOTAL_BATCH_SIZE // MAX_SEQ_LEN, 1))
    accumulate, rest = divmod(TOTAL_BATCH_SIZE, device_batch * MAX_SEQ_LEN)
    if rest:
        sys.exit(f"TOTAL_BATCH_SIZE {TOTAL_BATCH_SIZE} is no multiple of {device_batch} rows x {MAX_SEQ_LEN} tokens")
    loader = make_dataloader(tokenizer, device_batch, MAX_SEQ_LEN, "train")
    print(f"{num_params / 1e6:.1f}M parameters, {accumulate} x {device_batch} x {MAX_SEQ_LEN} tokens a step, {DEVICE}")

    smooth, going_on = 0.0, True
    while going_on:
        step_started, progress = time.perf_counter(), clock.progress
        for _ in range(accumulate):
            inputs, targets, epoch = next(loader)
            loss = net(inputs, targets)
            (loss / accumulate).backward()
        factor = lr_factor(progress)
        optimizer.step(factor, muon_momentum(clock.steps), WEIGHT_DECAY * (1 - progress))
        model.zero_grad(set_to_none=True)

        train_loss = loss.item()  # waits for the device
        if not train_loss <= MAX_LOSS:
            print(f"FAIL: loss {train_loss} at step {clock.steps + 1}: diverged")
            sys.exit(1)
        synchronize()
        going_on = clock.step()
        step = clock.steps
        smooth = 0.9 * smooth + 0.1 * train_loss
        speed = TOTAL_BATCH_SIZE / (time.perf_counter() - step_started)
        print(f"step {step} | progress {clock.progress:.4f} | loss {smooth / (1 - 0.9 ** step):.4f} | "
              f"lr {MATRIX_LR * factor:.2e} | {speed:.0f} tokens/s | epoch {epoch}", flush=True)

        if step == 1:
            gc.collect()
            gc.freeze()
            gc.disable()
        elif step % GC_EVERY_STEPS == 0:
            gc.collect()

    tokens = clock.steps * TOTAL_BATCH_SIZE
    timed = (clock.steps - 1) * TOTAL_BATCH_SIZE
    peak = peak_flops()
    mfu = 100 * flops_per_token * timed / clock.training_s / peak if peak else 0.0
    val_bpb = evaluate_bpb(net, tokenizer, DEVICE_BATCH_SIZE)
    print("---")
    print(f"val_bpb: {val_bpb:.6f}")
    print(f"training_seconds: {clock.training_s:.1f}")
    print(f"total_seconds: {time.perf_counter() - STARTED:.1f}")
    print(f"peak_vram_mb: {peak_memory_mb():.1f}")
    print(f"mfu_percent: {mfu:.2f}")
    print(f"total_tokens_M: {tokens / 1e6:.1f}")
    print(f"num_steps: {clock.steps}")
    print(f"num_params_M: {num_params / 1e6:.1f}")
    print(f"depth: {DEPTH}")


if __name__ == "__main__":
    main()
