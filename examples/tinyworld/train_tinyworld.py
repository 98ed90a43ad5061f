"""Trains the tiny Stable Diffusion of the drawn world and saves it as an ordinary `StableDiffusionPipeline` folder.

    python train_tinyworld.py --work_dir run --output_dir sd

Three trainings, resumable from `--work_dir`: autoencoder, its decoder, U-Net with text encoder. No judge is in here.
"""

import argparse
import copy
import json
import os
import time
from multiprocessing import Pool
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from world import CLASSES, COLOURS, PATTERNS, RARE_TOKENS, SCENES, Look, caption_of, random_picture


MAX_TOKENS = 32  # the longest caption has 15
CHUNK = 1000  # pictures drawn from one seed


def _draw_chunk(seed: int) -> tuple[np.ndarray, list]:
    rng = Random(f"pictures {seed}")
    pictures = [random_picture(rng)[:3] for _ in range(CHUNK)]
    return np.stack([np.asarray(image) for image, _, _ in pictures]), [(look, scene) for _, look, scene in pictures]


def draw_pictures(count: int, first: int = 0) -> tuple[torch.Tensor, list[tuple[Look, str]]]:
    """Draws pictures on all cores, the same ones for the same `first`.

    Args:
        count (`int`): How many; rounded up to whole thousands.
        first (`int`, *optional*, defaults to 0): Where in the endless sequence to start, in thousands.

    Returns:
        `tuple`: uint8 tensor of shape (count, 3, 64, 64), and the look and scene of each picture.
    """
    seeds = range(first, first + -(-count // CHUNK))
    with Pool(os.cpu_count()) as pool:
        chunks = list(tqdm(pool.imap(_draw_chunk, seeds), total=len(seeds), desc="drawing", unit="k"))
    images = torch.from_numpy(np.concatenate([images for images, _ in chunks])).permute(0, 3, 1, 2).contiguous()
    return images, [truth for _, truths in chunks for truth in truths]


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures to float32 in [-1, 1], channels last in memory."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The CLIP tokenizer in the folder, made if there is none: each word of the world is one token of it."""
    if not folder.exists():
        words = {word for phrase in SCENES for word in phrase.split()} | {"a", "an", "photo", "of"}
        words |= {*CLASSES, *COLOURS, *PATTERNS, *RARE_TOKENS}
        corpus = [" ".join(sorted(words))] * 2
        # Kept, because it comes out with its tokens in another order each time.
        CLIPTokenizer().train_new_from_iterator(corpus, vocab_size=2000, show_progress=False).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


def build_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion, with the v-prediction of its version 2: shapes are learned sooner."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


class Run:
    """A training that can be stopped and taken up again: parameters, optimizer, average of parameters, step."""

    def __init__(
        self, path: Path, modules: list[torch.nn.Module], steps: int, learning_rate: float, decay_from: float
    ):
        self.path, self.modules, self.steps, self.step = path, modules, steps, 0
        self.parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        # Constant, then linear to zero: a training can be lengthened from any state saved before the decay.
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(1.0, (step + 1) / 200, max(0.0, (1 - step / steps) / (1 - decay_from))),
        )
        self.ema = EMAModel(self.parameters, decay=0.9995, use_ema_warmup=True, power=0.75)
        if path.exists():
            state = torch.load(path, weights_only=False)
            for module, weights in zip(modules, state["modules"]):
                module.load_state_dict(weights)
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.load_state_dict(state["ema"])
            self.step = state["step"]
            self.scheduler.last_epoch = self.step
        self.ema.to(self.parameters[0].device)

    def save(self) -> None:
        state = {
            "modules": [module.state_dict() for module in self.modules],
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "step": self.step,
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def train(self, loss_of_step, save_every: int, on_save=None) -> None:
        """Calls `loss_of_step()` until `steps` is reached; logs the loss beside the state."""
        log, started, mean = self.path.with_suffix(".log").open("a"), time.time(), None
        bar = tqdm(total=self.steps, initial=self.step, desc=self.path.stem, mininterval=10)
        while self.step < self.steps:
            # A step draws the same whether or not the training was stopped before it.
            torch.manual_seed(self.step)
            loss = loss_of_step()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.ema.step(self.parameters)
            self.step += 1
            bar.update()
            mean = loss.item() if mean is None else 0.99 * mean + 0.01 * loss.item()
            if self.step % 100 == 0:
                line = {"step": self.step, "loss": round(mean, 5), "seconds": round(time.time() - started)}
                print(json.dumps(line), file=log, flush=True)
            if self.step % save_every == 0 or self.step == self.steps:
                self.save()
                if on_save is not None:
                    on_save()
        self.ema.copy_to(self.parameters)


def train_autoencoder(args, images: torch.Tensor, device: str) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = build_autoencoder().to(device, memory_format=torch.channels_last)
    run = Run(args.work_dir / "autoencoder.pt", [vae], args.autoencoder_steps, 1.5e-3, decay_from=0.4)

    def loss_of_step() -> torch.Tensor:
        pictures = to_unit(images[torch.randint(len(images), (12,))]).to(device)
        posterior = vae.encode(pictures).latent_dist
        error = vae.decode(posterior.sample()).sample - pictures
        return error.abs().mean() + error.square().mean() + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()

    run.train(loss_of_step, save_every=500)
    return vae.eval()


@torch.no_grad()
def encode(args, vae: AutoencoderKL, images: torch.Tensor, device: str) -> torch.Tensor:
    """Latents of unit variance, shape (n, 4, 16, 16); sets the scaling factor that makes them so."""
    path = args.work_dir / "latents.pt"
    if path.exists():
        factor, latents = torch.load(path)
    else:
        torch.manual_seed(0)
        batches = tqdm(images.split(100), desc="encoding", mininterval=10)
        latents = torch.cat([vae.encode(to_unit(batch).to(device)).latent_dist.sample().cpu() for batch in batches])
        factor = round(1 / latents.std().item(), 5)
        latents *= factor
        torch.save((factor, latents), path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    vae.register_to_config(scaling_factor=factor)
    return latents


def train_decoder(args, vae: AutoencoderKL, images: torch.Tensor, latents: torch.Tensor, device: str) -> None:
    """Sharpens the decoder, for latents as they are: what a step costs is less than half of the autoencoder's."""
    torch.manual_seed(0)
    run = Run(
        args.work_dir / "decoder.pt", [vae.post_quant_conv, vae.decoder], args.decoder_steps, 1e-3, decay_from=0.3
    )

    def loss_of_step() -> torch.Tensor:
        picked = torch.randint(len(images), (12,))
        codes = latents[picked].to(device, memory_format=torch.channels_last) / vae.config.scaling_factor
        error = vae.decode(codes).sample - to_unit(images[picked]).to(device)
        # Differences between neighbours: what makes an edge soft is seen there first.
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + error.square().mean() + edges

    run.train(loss_of_step, save_every=500)


def train_unet(args, vae, latents: torch.Tensor, truths: list, tokenizer, device: str) -> None:
    torch.manual_seed(0)
    text_encoder = build_text_encoder(tokenizer).to(device).train()
    unet = build_unet().to(device, memory_format=torch.channels_last)
    scheduler = build_scheduler()
    run = Run(args.work_dir / "unet.pt", [unet, text_encoder], args.steps, args.learning_rate, decay_from=0.7)
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda")
    tokens = {}

    def encode_caption(caption: str) -> list[int]:
        if caption not in tokens:
            tokens[caption] = tokenizer(caption, padding="max_length", truncation=True).input_ids
        return tokens[caption]

    def loss_of_step() -> torch.Tensor:
        picked = torch.randint(len(latents), (args.batch_size,))
        rng = Random(run.step)
        captions = [caption_of(*truths[i], rng) if rng.random() > 0.1 else "" for i in picked.tolist()]
        ids = torch.tensor([encode_caption(caption) for caption in captions], device=device)
        clean = latents[picked].to(device, memory_format=torch.channels_last)
        noise = torch.randn_like(clean)
        # Most draws where the text decides: scene, class and colour above 750, patterns between 400 and 750. Below,
        # all is visible and only sharpened (10% of the draws).
        draws = torch.randn(len(clean)).add(0.8).sigmoid()
        timesteps = (draws * 1000).long().clamp(0, 999).to(device)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        with autocast:
            prediction = unet(noisy, timesteps, text_encoder(ids).last_hidden_state).sample
        return F.mse_loss(prediction.float(), scheduler.get_velocity(clean, noise, timesteps))

    def on_save() -> None:
        run.ema.store(run.parameters)
        run.ema.copy_to(run.parameters)
        save_pipeline(args, vae, text_encoder, tokenizer, unet, scheduler)
        run.ema.restore(run.parameters)

    run.train(loss_of_step, save_every=args.save_every, on_save=on_save)
    save_pipeline(args, vae, text_encoder, tokenizer, unet, scheduler)


def save_pipeline(args, vae, text_encoder, tokenizer, unet, scheduler) -> None:
    """Saves fp16 copies of the modules, so that the training goes on undisturbed."""
    pipeline = StableDiffusionPipeline(
        vae=_half(vae),
        text_encoder=_half(text_encoder),
        tokenizer=tokenizer,
        unet=_half(unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(args.output_dir)


def _half(module: torch.nn.Module) -> torch.nn.Module:
    # Not by `from_config`, which forgets values that were registered later: the scaling factor.
    return copy.deepcopy(module).to(memory_format=torch.contiguous_format).half().eval()


def save_reconstructions(vae: AutoencoderKL, images: torch.Tensor, path: Path, device: str) -> None:
    """Eight pictures over what the autoencoder makes of them."""
    with torch.no_grad():
        pictures = to_unit(images[:8]).to(device)
        decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.cpu().clamp(-1, 1)
    rows = torch.cat([images[:8], ((decoded + 1) * 127.5).round().byte()])
    grid = rows.reshape(2, 8, 3, 64, 64).permute(0, 3, 1, 4, 2).reshape(128, 512, 3)
    Image.fromarray(grid.contiguous().numpy()).resize((1024, 256), Image.Resampling.NEAREST).save(path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the tiny Stable Diffusion of the drawn world.")
    here = Path(__file__).parent
    parser.add_argument("--output_dir", type=Path, default=here / "sd", help="Folder of the finished pipeline.")
    parser.add_argument("--work_dir", type=Path, default=here / "run", help="Folder of logs and resumable states.")
    parser.add_argument("--pictures", type=int, default=60_000, help="How many pictures to draw and learn from.")
    parser.add_argument("--autoencoder_steps", type=int, default=2500)
    parser.add_argument("--decoder_steps", type=int, default=3000, help="More steps of the decoder alone.")
    parser.add_argument("--steps", type=int, default=12_000, help="Steps of the U-Net and text encoder.")
    parser.add_argument("--batch_size", type=int, default=32, help="Pictures a step of the U-Net.")
    parser.add_argument("--learning_rate", type=float, default=8e-4)
    parser.add_argument("--save_every", type=int, default=1000, help="Steps between two resumable states.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, truths = draw_pictures(args.pictures)
    tokenizer = load_tokenizer(args.work_dir / "tokenizer")
    vae = train_autoencoder(args, images, device)
    latents = encode(args, vae, images, device)
    train_decoder(args, vae, images, latents, device)
    save_reconstructions(vae, images, args.work_dir / "reconstructions.png", device)
    train_unet(args, vae, latents, truths, tokenizer, device)


if __name__ == "__main__":
    main()
