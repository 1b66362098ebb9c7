"""Train the bundled model of shapes, stage by stage: autoencoder, text encoder (contrastive), denoiser, export; and then its scorer.

Every stage is checkpointed and goes on where it stopped; a stage that is finished is skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ...demo import checkpoint, model, world
from ...demo.checkpoint import LATENT_SCALE
from .layouts import LayoutReading
from .pool import make_pool, pictures, take
from .scorer import train_and_store
from .stage import Stage, initialise, plain_attention
from .text import Words, encode

# --- autoencoder ----------------------------------------------------------------------------------------------------


def train_autoencoder(minutes: float) -> nn.Module:
    """Pictures to 4-channel latents at an eighth of the size, and back."""
    autoencoder = model.ARCHITECTURE.autoencoder()
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


def train_text(latents: Tensor, scenes: list[world.Scene], minutes: float, words: Words) -> nn.Module:
    """Contrastive: a caption finds its own picture in a batch, and the other way round."""
    tower = checkpoint.text_tower()
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


def train_denoiser(
    latents: Tensor,
    scenes: list[world.Scene],
    text: nn.Module,
    minutes: float,
    words: Words,
    start: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Noise prediction on SD's schedule, min-SNR-5 weights, a tenth of the captions dropped for guidance; with `LayoutReading`."""
    unet = model.ARCHITECTURE.unet()
    initialise(unet, 3)
    with torch.no_grad():  # residual branches start as nothing
        for name, parameter in unet.named_parameters():
            if name.startswith("out.2") or ".out_layers.3." in name or ".proj_out." in name:
                parameter.zero_()
    if start is not None:
        unet.load_state_dict(start)
    unet = unet.to(memory_format=torch.channels_last)
    torch.manual_seed(3)
    reading = LayoutReading()

    @torch.compile
    def forward(x: Tensor, t: Tensor, context: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        taps = []

        def tap(h: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
            taps.append(h)
            return h, skip

        options = {"optimized_attention_override": plain_attention, "patches": {"output_block_patch": [tap]}}
        guess = unet._forward(x, t, context, None, None, options)
        return guess, reading(taps[2], taps[4], truth)  # before output blocks 2 and 4

    layouts, table = LayoutReading.truth(scenes)
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
    rng = np.random.default_rng(4)
    for scene in take(world.scenes("train", 4), 4000):
        words.ids(world.describe(scene, rng).text)
    numbers = sorted({words.START, words.END, *(n for ids in words.known.values() for n in ids)})
    parts = {f"denoiser.{k}": v for k, v in denoiser.state_dict().items()}
    parts |= {f"autoencoder.{k}": v for k, v in autoencoder.state_dict().items()}
    parts |= {f"text.{k}": v for k, v in text.state_dict().items() if k != checkpoint.TOKEN_ROWS}
    parts["text.token_rows"] = text.state_dict()[checkpoint.TOKEN_ROWS][numbers]
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
    command = " ".join(("run.py train", *argv))
    if args.only_scorer:
        train_and_store(args.pool, args.scorer_minutes, command)
        return 0
    words = Words()
    if args.go_on:
        shipped = model.stored()
        autoencoder: nn.Module = model.ARCHITECTURE.autoencoder().eval()
        autoencoder.load_state_dict(shipped["autoencoder"])
        text: nn.Module = checkpoint.text_tower().eval()
        text.load_state_dict(shipped["text"])
        latents, scenes = make_pool(autoencoder, args.pool)
    else:
        autoencoder = train_autoencoder(args.autoencoder_minutes).eval()
        normalise(autoencoder, world.scenes("train", 3))
        latents, scenes = make_pool(autoencoder, args.pool)
        text = train_text(latents, scenes, args.text_minutes, words)
    start = shipped["denoiser"] if args.go_on else None
    denoiser = train_denoiser(latents, scenes, text, args.denoiser_minutes, words, start)
    export(autoencoder, text, denoiser, words, command)
    train_and_store(args.pool, args.scorer_minutes, command)
    return 0
