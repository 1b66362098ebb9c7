"""Train the bundled model, stage by stage: autoencoder, text encoder (contrastive), denoiser, export; and then its scorer.

Every stage is checkpointed and goes on where it stopped; a stage that is finished is skipped.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...demo import world

CHECKPOINTS = Path(__file__).parents[2] / ".runtime" / "training"
LATENT_SCALE = 0.18215  # SD1.5's, met by scaling the autoencoder's own latents


# --- shared by the stages -------------------------------------------------------------------------------------------


def initialise(module: nn.Module, seed: int) -> None:
    """ComfyUI's layers come uninitialised; give every one the usual start."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        with torch.no_grad():
            if isinstance(layer, nn.Embedding):
                weight.normal_(0, 0.02, generator=generator)
            elif weight.ndim == 1:
                weight.fill_(1)
            else:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
            if getattr(layer, "bias", None) is not None:
                layer.bias.zero_()


def pictures(scenes: list[world.Scene]) -> Tensor:
    """``float [B, 3, SIZE, SIZE]`` in [-1, 1]."""
    batch = np.stack([world.render(s) for s in scenes])
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def take(source: Iterator[world.Scene], count: int) -> list[world.Scene]:
    return [next(source) for _ in range(count)]


class Stage:
    """One training loop: a cosine schedule by time spent, checkpoints every few minutes, an average of the weights.

    Time is what this thread has worked, so that a machine busy with other things makes training longer, not worse.
    """

    def __init__(self, name: str, modules: dict[str, nn.Module], minutes: float, rate: float, decay: float = 0.999):
        self.name, self.modules, self.seconds, self.rate, self.decay = name, modules, minutes * 60, rate, decay
        self.path = CHECKPOINTS / f"{name}.pt"
        self.average = copy.deepcopy(nn.ModuleDict(modules)).requires_grad_(False)
        self.live = nn.ModuleDict(modules)
        self.optimiser = torch.optim.AdamW(self.live.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.step, self.spent = 0, 0.0
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            self.live.load_state_dict(saved["live"])
            self.average.load_state_dict(saved["average"])
            self.optimiser.load_state_dict(saved["optimiser"])
            self.step, self.spent = saved["step"], saved["spent"]

    @property
    def done(self) -> bool:
        return self.spent >= self.seconds

    def save(self) -> None:
        CHECKPOINTS.mkdir(parents=True, exist_ok=True)
        state = {"live": self.live.state_dict(), "average": self.average.state_dict(), "optimiser": self.optimiser.state_dict()}
        temporary = self.path.with_suffix(".tmp")
        torch.save({**state, "step": self.step, "spent": self.spent}, temporary)
        temporary.replace(self.path)

    def run(self, loss: Callable[[int], tuple[Tensor, dict[str, float]]], batch: int) -> None:
        """Call ``loss(step)`` until the time is spent."""
        began, saved_at, said, window = time.thread_time() - self.spent, self.spent, self.spent, self.step
        while not self.done:
            progress = self.spent / self.seconds
            warm = min(1.0, (self.step + 1) / 200)
            for group in self.optimiser.param_groups:
                group["lr"] = self.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            value, notes = loss(self.step)
            self.optimiser.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(self.live.parameters(), 1.0)
            self.optimiser.step()
            keep = min(self.decay, (1 + self.step) / (10 + self.step))
            averaged: list[Tensor] = list(self.average.parameters())
            live: list[Tensor] = list(self.live.parameters())
            torch._foreach_lerp_(averaged, live, 1 - keep)
            self.step += 1
            self.spent = time.thread_time() - began
            if self.spent - said > 30:
                speed = (self.step - window) * batch / (self.spent - said)
                words = "  ".join(f"{k} {v:.4f}" for k, v in notes.items())
                print(
                    f"{self.name}: {self.spent / 60:5.1f} of {self.seconds / 60:.0f} min, step {self.step}, {speed:.0f}/s  {words}",
                    flush=True,
                )
                said, window = self.spent, self.step
            if self.spent - saved_at > 90:
                self.save()
                saved_at = self.spent
        self.save()


# --- autoencoder ----------------------------------------------------------------------------------------------------


def train_autoencoder(minutes: float) -> nn.Module:
    """Pictures to 4-channel latents at an eighth of the size, and back."""
    from ...demo import model

    autoencoder = model.autoencoder()
    initialise(autoencoder, 1)
    stage = Stage("autoencoder", {"autoencoder": autoencoder.to(memory_format=torch.channels_last)}, minutes, 1.5e-3)
    source, rng = world.scenes("train", 10 + stage.step), np.random.default_rng(stage.step)
    encoder, decoder = (torch.compile(part, dynamic=False) for part in (autoencoder.encoder, autoencoder.decoder))

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        # Crops are quick, but group norms see the whole picture: the last part is trained on whole ones.
        crop, batch = (64, 8) if stage.spent < 0.72 * stage.seconds else (world.SIZE, 6)
        whole = pictures(take(source, batch))
        x, y = (8 * rng.integers(0, (world.SIZE - crop) // 8 + 1, size=2)).tolist()  # patterns keep their phase
        target = whole[:, :, y : y + crop, x : x + crop].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            moments = autoencoder.quant_conv(encoder(target))
            mean, log_variance = moments.float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-20, 10)
            z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
            out = decoder(autoencoder.post_quant_conv(z)).float()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        error = (out - target).abs().mean()
        square = F.mse_loss(out, target)
        return error + square + 2e-4 * kl, {"L1": error.item(), "mse": square.item(), "kl": kl.item(), "std": mean.std().item()}

    stage.run(loss, 8)
    return stage.average["autoencoder"]


def normalise(autoencoder: nn.Module, source: Iterator[world.Scene], count: int = 768) -> None:
    """Fold a shift and a scale per channel into the 1x1 convolutions, so that latents times `LATENT_SCALE` have mean 0, deviation 1."""
    with torch.no_grad():
        moments = torch.cat(
            [autoencoder.quant_conv(autoencoder.encoder(pictures(take(source, 32)))) for _ in range(count // 32)]
        )
        mean = moments[:, :4]
        shift, scale = mean.mean((0, 2, 3)), mean.std((0, 2, 3)) * LATENT_SCALE
        into, out = autoencoder.quant_conv, autoencoder.post_quant_conv
        out.bias.add_(out.weight[:, :, 0, 0] @ shift)
        out.weight.mul_(scale[None, :, None, None])
        into.bias[:4].sub_(shift).div_(scale)
        into.weight[:4].div_(scale[:, None, None, None])
        into.bias[4:].sub_(2 * scale.log())


# --- the pool: scenes with their latents, for the next two stages ----------------------------------------------------


def make_pool(autoencoder: nn.Module, number: int, split: str = "train") -> tuple[Tensor, list[world.Scene]]:
    """``float16 [number, 4, 16, 16]`` latents of deviation 1, and their scenes; kept on disk."""
    path = CHECKPOINTS / ("pool.pt" if split == "train" else f"pool_{split}.pt")
    source = world.scenes(split, 1)
    scenes = take(source, number)
    if path.exists():
        latents = torch.load(path, weights_only=True)
        if len(latents) == number:
            return latents, scenes
    latents = torch.empty(number, 4, world.SIZE // 8, world.SIZE // 8, dtype=torch.float16)
    encode = torch.compile(lambda x: autoencoder.quant_conv(autoencoder.encoder(x)))
    size, began = 50, time.time()
    for start in range(0, number, size):
        batch = pictures(scenes[start : start + size]).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents[start : start + size] = (encode(batch)[:, :4] * LATENT_SCALE).half()
        if start % 5000 == 0:
            print(f"pool: {start} of {number}, {(start + size) / (time.time() - began):.0f}/s", flush=True)
    torch.save(latents, path)
    return latents, scenes


# --- words ----------------------------------------------------------------------------------------------------------


class Words:
    """CLIP's own BPE tokens for the grammar's sentences, one look-up a word (CLIP never joins words)."""

    LENGTH, START, END = 77, 49406, 49407

    def __init__(self) -> None:
        from comfy.sd1_clip import SD1Tokenizer

        self.tokenizer = SD1Tokenizer()
        self.known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """A sentence as LENGTH token numbers, padded with END as SD1 does."""
        out = [self.START]
        for word in text.split():
            if word not in self.known:
                chunk = self.tokenizer.tokenize_with_weights(word)["l"][0]
                self.known[word] = [t for t, _ in chunk if t not in (self.START, self.END)]
            out += self.known[word]
        if len(out) >= self.LENGTH:
            raise ValueError(f"longer than {self.LENGTH} tokens: {text}")
        return out + [self.END] * (self.LENGTH - len(out))

    def batch(self, texts: list[str]) -> Tensor:
        return torch.tensor([self.ids(t) for t in texts])


# --- text encoder ---------------------------------------------------------------------------------------------------


class PictureTower(nn.Module):
    """Latents to one vector: only needed to train the text encoder against, as CLIP's is."""

    def __init__(self, width: int = 128):
        super().__init__()
        plan = ((4, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1))
        self.body = nn.Sequential(
            *(layer for i, o, stride in plan for layer in (nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU()))
        )
        self.out = nn.Linear(512, width, bias=False)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.body(latents)
        return self.out(torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1))


def encode(tower: nn.Module, tokens: Tensor) -> Tensor:
    """The text tower's projected summary of ``tokens [B, L]``, L up to the first END.

    Written out because ComfyUI's own forward asks for all 77 tokens and adds in place, which gradients do not survive.
    """
    from comfy.ldm.modules.attention import optimized_attention_for_device

    body = tower.text_model
    length = tokens.shape[1]
    x = body.embeddings.token_embedding(tokens) + body.embeddings.position_embedding.weight[:length]
    mask = torch.full((length, length), -torch.finfo(x.dtype).max).triu_(1)
    attention = optimized_attention_for_device(x.device, mask=True, small_input=True)
    for layer in body.encoder.layers:
        x = x + layer.self_attn(layer.layer_norm1(x), mask, attention)
        x = x + layer.mlp(layer.layer_norm2(x))
    first_end = (tokens == Words.END).int().argmax(dim=1)
    return tower.text_projection(body.final_layer_norm(x)[torch.arange(len(x)), first_end])


def train_text(latents: Tensor, scenes: list[world.Scene], minutes: float, words: Words) -> nn.Module:
    """Contrastive: a caption finds its own picture in a batch, and the other way round."""
    from ...demo import model

    tower = model.text_tower()
    initialise(tower, 2)
    torch.manual_seed(2)
    picture = PictureTower().to(memory_format=torch.channels_last)
    say, see = torch.compile(encode, dynamic=False), torch.compile(picture, dynamic=False)
    scale = nn.ParameterDict({"log_scale": nn.Parameter(torch.tensor(2.65))})
    stage = Stage("text", {"text": tower, "picture": picture, "scale": scale}, minutes, 1e-3)
    rng, batch = np.random.default_rng([2, stage.step]), 256
    alike: dict[tuple[str, str, int], list[int]] = {}
    for i, s in enumerate(scenes):
        alike.setdefault((s.background, s.background_pattern, len(s.things)), []).append(i)
    groups = [g for g in alike.values() if len(g) >= batch]

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        # Three batches in four share background and count, so that only the things tell pictures apart.
        chosen = rng.choice(groups[rng.integers(len(groups))] if groups and step % 4 else len(scenes), batch, replace=False)
        tokens = words.batch([world.describe(scenes[i], rng).text for i in chosen])
        # Causal: what follows the end changes nothing. Rounded up, so that few lengths are compiled.
        tokens = tokens[:, : -(-(int((tokens != words.END).sum(1).max()) + 1) // 8) * 8]
        x = latents[chosen].float()
        with torch.autocast("cpu", torch.bfloat16):
            a = F.normalize(say(tower, tokens).float(), dim=-1)
            b = F.normalize(see(x + 0.1 * torch.randn_like(x)).float(), dim=-1)
        logits = a @ b.T * scale["log_scale"].exp().clamp(max=100)
        target = torch.arange(batch)
        right = (logits.argmax(1) == target).float().mean().item()
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)), {"right": right}

    stage.run(loss, batch)
    return stage.average["text"].eval()


# --- denoiser -------------------------------------------------------------------------------------------------------


def plain_attention(function: object, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: object, **kwargs: object) -> Tensor:
    """softmax(QKᵀ/√d)V written out: the CPU's flash attention is slow backwards at these sizes, the compiler fuses this."""
    q, k, v = (t.view(t.shape[0], t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1).to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)


class Reading(nn.Module):
    """What is where, read from the denoiser's own features: a help in training that does not ship.

    Two linear maps, from 8x8 and from 16x16 features, name the noun, colour and pattern at each latent pixel. They make
    the denoiser look words up early; its own objective alone finds that out ten times more slowly.
    """

    CLASSES = (len(world.NOUNS) + 1, len(world.COLOURS) + len(world.BACKGROUNDS), len(world.PATTERNS))

    def __init__(self, coarse: int = 128, fine: int = 64):
        super().__init__()
        self.coarse, self.fine = nn.Conv2d(coarse, 4 * sum(self.CLASSES), 1), nn.Conv2d(fine, sum(self.CLASSES), 1)

    def forward(self, coarse: Tensor, fine: Tensor, truth: Tensor) -> Tensor:
        """Mean cross-entropy against ``truth [B, 3, 16, 16]`` (class numbers, -100 where a cell is mixed)."""
        losses = [
            F.cross_entropy(part.float(), truth[:, i], ignore_index=-100)
            for read in (F.pixel_shuffle(self.coarse(coarse), 2), self.fine(fine))
            for i, part in enumerate(read.split(self.CLASSES, dim=1))
        ]
        return torch.stack(losses).mean()

    @staticmethod
    def truth(scenes: list[world.Scene]) -> tuple[Tensor, Tensor]:
        """Layouts ``int8 [N, 16, 16]`` and, for background and things, their classes ``int16 [N, 5, 3]`` (last: mixed)."""
        layouts = torch.from_numpy(np.stack([world.layout(s) for s in scenes]))
        colours, patterns = [*world.COLOURS, *world.BACKGROUNDS], world.PATTERNS
        table = torch.full((len(scenes), 5, 3), -100, dtype=torch.int16)
        for row, s in zip(table, scenes, strict=True):
            named = [(len(world.NOUNS), colours.index(s.background), patterns.index(s.background_pattern))]
            named += [(world.NOUNS.index(t.noun), colours.index(t.colour), patterns.index(t.pattern)) for t in s.things]
            row[: len(named)] = torch.tensor(named)
        return layouts, table


def train_denoiser(
    latents: Tensor,
    scenes: list[world.Scene],
    text: nn.Module,
    minutes: float,
    words: Words,
    start: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Noise prediction on SD's schedule, min-SNR-5 weights, a tenth of the captions dropped for guidance; with `Reading`."""
    from ...demo import model

    unet = model.unet()
    initialise(unet, 3)
    with torch.no_grad():  # residual branches start as nothing
        for name, parameter in unet.named_parameters():
            if name.startswith("out.2") or ".out_layers.3." in name or ".proj_out." in name:
                parameter.zero_()
    if start is not None:
        unet.load_state_dict(start)
    unet = unet.to(memory_format=torch.channels_last)
    torch.manual_seed(3)
    reading = Reading()

    @torch.compile
    def forward(x: Tensor, t: Tensor, context: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        taps = []

        def tap(h: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
            taps.append(h)
            return h, skip

        options = {"optimized_attention_override": plain_attention, "patches": {"output_block_patch": [tap]}}
        guess = unet._forward(x, t, context, None, None, options)
        return guess, reading(taps[2], taps[4], truth)  # before output blocks 2 and 4

    layouts, table = Reading.truth(scenes)
    stage = Stage("denoiser", {"denoiser": unet, "reading": reading}, minutes, 1e-3, decay=0.9995)
    rng, batch = np.random.default_rng([3, stage.step]), 48
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - beta, 0).float()

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = rng.integers(0, len(scenes), batch)
        texts = ["" if rng.random() < 0.1 else world.describe(scenes[i], rng).text for i in chosen]
        x, t = latents[chosen].float(), torch.from_numpy((rng.permutation(batch) + rng.random(batch)) / batch * 1000).long()
        noise, a = torch.randn_like(x), kept[t][:, None, None, None]
        noisy = (a.sqrt() * x + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                context = text(words.batch(texts))[0]
            where = layouts[chosen].long().flatten(1)[:, :, None].expand(-1, -1, 3)  # -1 takes the last row: mixed
            truth = table[chosen].long().gather(1, where % 5).transpose(1, 2).unflatten(2, layouts.shape[1:])
            guess, read = forward(noisy, t.float(), context.float(), truth)
        snr = a / (1 - a)
        error = ((guess.float() - noise) ** 2).mean((1, 2, 3))
        own = (error * (snr.clamp(max=5) / snr).flatten()).mean()
        help_ = 0.3 * (1 - stage.spent / stage.seconds) * read
        return 4 * own + help_, {"error": error.mean().item(), "read": read.item()}

    stage.run(loss, batch)
    return stage.average["denoiser"].eval()


# --- the file that ships ---------------------------------------------------------------------------------------------


def preview_factors(autoencoder: nn.Module, source: Iterator[world.Scene]) -> Tensor:
    """Least-squares colours of latents, ``[5, 3]``: four channels and a constant, for ComfyUI's previews."""
    batch = pictures(take(source, 128))
    with torch.no_grad():
        latents = autoencoder.quant_conv(autoencoder.encoder(batch))[:, :4] * LATENT_SCALE
    known = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1).permute(0, 2, 3, 1).reshape(-1, 5)
    return torch.linalg.lstsq(known, F.avg_pool2d(batch, 8).permute(0, 2, 3, 1).reshape(-1, 3)).solution


def export(autoencoder: nn.Module, text: nn.Module, denoiser: nn.Module, words: Words, command: str) -> Path:
    """Write the weights as fp16 safetensors; of the token table only the rows that the grammar can say."""
    from safetensors.torch import save_file

    from ...demo import model

    rng = np.random.default_rng(4)
    for scene in take(world.scenes("train", 4), 4000):
        words.ids(world.describe(scene, rng).text)
    numbers = sorted({words.START, words.END, *(n for ids in words.known.values() for n in ids)})
    parts = {f"denoiser.{k}": v for k, v in denoiser.state_dict().items()}
    parts |= {f"autoencoder.{k}": v for k, v in autoencoder.state_dict().items()}
    parts |= {f"text.{k}": v for k, v in text.state_dict().items() if k != model.TOKEN_ROWS}
    parts["text.token_rows"] = text.state_dict()[model.TOKEN_ROWS][numbers]
    parts["preview.factors"] = preview_factors(autoencoder, world.scenes("train", 5))
    tensors = {k: v.half().contiguous() for k, v in parts.items()} | {
        "text.token_numbers": torch.tensor(numbers, dtype=torch.int32)
    }
    path = model.WEIGHTS / "shapes.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata={"data_version": world.DATA_VERSION, "command": command})
    print(f"saved {path}: {path.stat().st_size / 1e6:.1f} MB", flush=True)
    return path


def main(argv: list[str]) -> int:
    from ...demo import model

    parser = argparse.ArgumentParser(prog="run.py train", description=__doc__)
    parser.add_argument("--autoencoder-minutes", type=float, default=25)
    parser.add_argument("--text-minutes", type=float, default=11)
    parser.add_argument("--denoiser-minutes", type=float, default=80)
    parser.add_argument("--pool", type=int, default=60_000, help="pictures encoded for the last two stages")
    parser.add_argument(
        "--continue",
        dest="go_on",
        action="store_true",
        help="keep the shipped autoencoder and text encoder, train the denoiser on",
    )
    parser.add_argument("--scorer-minutes", type=float, default=15, help="the dual encoder that scores pictures")
    parser.add_argument("--only-scorer", action="store_true", help="keep the shipped model, train only its scorer")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    if args.only_scorer:
        _scorer(args.pool, args.scorer_minutes, argv)
        return 0
    words = Words()
    if args.go_on:
        shipped = model.stored()
        autoencoder: nn.Module = model.autoencoder().eval()
        autoencoder.load_state_dict(shipped["autoencoder"])
        text: nn.Module = model.text_tower().eval()
        text.load_state_dict(shipped["text"])
        latents, scenes = make_pool(autoencoder, args.pool)
    else:
        autoencoder = train_autoencoder(args.autoencoder_minutes).eval()
        normalise(autoencoder, world.scenes("train", 3))
        latents, scenes = make_pool(autoencoder, args.pool)
        text = train_text(latents, scenes, args.text_minutes, words)
    start = shipped["denoiser"] if args.go_on else None
    denoiser = train_denoiser(latents, scenes, text, args.denoiser_minutes, words, start)
    export(autoencoder, text, denoiser, words, "run.py train " + " ".join(argv))
    _scorer(args.pool, args.scorer_minutes, argv)
    return 0


def _scorer(pool: int, minutes: float, argv: list[str]) -> None:
    """Train the scorer on latents of the shipped autoencoder, and write its file."""
    from ...demo import model, scorer
    from . import scorer as scorer_training

    autoencoder = model.autoencoder().eval()
    autoencoder.load_state_dict(model.stored()["autoencoder"])
    pools = [make_pool(autoencoder, pool), make_pool(autoencoder, pool // 8, "tune")]
    latents, scenes = torch.cat([p[0] for p in pools]), [s for p in pools for s in p[1]]
    encoder = scorer_training.train_scorer(latents, scenes, minutes)
    scorer.store(encoder, scorer.WEIGHTS, "run.py train " + " ".join(argv))
    print(f"saved {scorer.WEIGHTS}: {scorer.WEIGHTS.stat().st_size / 1e6:.1f} MB", flush=True)
