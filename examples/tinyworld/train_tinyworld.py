"""Trains the tiny Stable Diffusion of the drawn world, or its SDXL sibling; saves it as an ordinary pipeline folder.

    python train_tinyworld.py           # sd/: autoencoder, its decoder, U-Net with text encoder
    python train_tinyworld.py --sdxl    # sdxl/, from sd/: two text encoders, then U-Net with both of them

All trainings are resumable from `--work_dir`. No judge is in here.
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
import quiet  # noqa: F401
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from world import CLASSES, COLOURS, PATTERNS, RARE_TOKENS, SCENES, SIZE, Look, caption_of, random_look, random_picture


HERE = Path(__file__).resolve().parent
MAX_TOKENS = 32  # the longest caption has 15
CHUNK = 1000  # pictures drawn from one seed
WIDTH, WIDTH_2 = 128, 64  # of the text encoder, and of SDXL's second one


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


def build_text_encoder(tokenizer: CLIPTokenizer, kind=CLIPTextModel, width: int = WIDTH, layers: int = 2):
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
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
        cross_attention_dim=WIDTH,
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
def encode(path: Path, vae: AutoencoderKL, images: torch.Tensor, device: str) -> torch.Tensor:
    """Latents as the autoencoder gives them, unscaled, shape (n, 4, 16, 16); kept in the file."""
    if not path.exists():
        torch.manual_seed(0)
        batches = tqdm(images.split(100), desc="encoding", mininterval=10)
        latents = torch.cat([vae.encode(to_unit(batch).to(device)).latent_dist.sample().cpu() for batch in batches])
        torch.save(latents, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    return torch.load(path)


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


def train_unet(args, path: Path, pipeline: DiffusionPipeline, condition, latents, truths: list, device: str) -> None:
    """Trains the U-Net and all text encoders of a pipeline, and saves it in fp16.

    Args:
        path (`Path`): File of the resumable state.
        condition (`Callable`):
            Token ids, shape (n, 32), and indices of pictures, shape (n,), to what the U-Net takes beside them.
        latents (`torch.Tensor`): Shape (pictures, 4, 16, 16), of unit variance.
        truths (`list`): Look and scene of each picture.
    """
    encoders = [module for name, module in pipeline.components.items() if name.startswith("text_encoder")]
    unet = pipeline.unet.to(device, memory_format=torch.channels_last).train()
    modules = [unet, *(encoder.to(device).train() for encoder in encoders)]
    scheduler = pipeline.scheduler
    run = Run(path, modules, args.steps, args.learning_rate, decay_from=args.decay_from)
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda")
    tokens = {}

    def encode_caption(caption: str) -> list[int]:
        if caption not in tokens:
            tokens[caption] = pipeline.tokenizer(caption, padding="max_length", truncation=True).input_ids
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
            prediction = unet(noisy, timesteps, **condition(ids, picked)).sample
        return F.mse_loss(prediction.float(), scheduler.get_velocity(clean, noise, timesteps))

    def on_save() -> None:
        run.ema.store(run.parameters)
        run.ema.copy_to(run.parameters)
        save_half(pipeline, args.output_dir)
        run.ema.restore(run.parameters)

    run.train(loss_of_step, save_every=args.save_every, on_save=on_save)
    save_half(pipeline, args.output_dir)


def save_half(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Saves an fp16 copy, so that the training goes on undisturbed."""
    # Not by `from_config`, which forgets values that were registered later: the scaling factor.
    pipeline = copy.deepcopy(pipeline)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.to(memory_format=torch.contiguous_format).half().eval()
    pipeline.save_pretrained(folder)


def save_reconstructions(vae: AutoencoderKL, images: torch.Tensor, path: Path, device: str) -> None:
    """Eight pictures over what the autoencoder makes of them."""
    with torch.no_grad():
        pictures = to_unit(images[:8]).to(device)
        decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.cpu().clamp(-1, 1)
    rows = torch.cat([images[:8], ((decoded + 1) * 127.5).round().byte()])
    grid = rows.reshape(2, 8, 3, 64, 64).permute(0, 3, 1, 4, 2).reshape(128, 512, 3)
    Image.fromarray(grid.contiguous().numpy()).resize((1024, 256), Image.Resampling.NEAREST).save(path)


def train_sd(args, device: str) -> None:
    images, truths = draw_pictures(args.pictures)
    tokenizer = load_tokenizer(args.work_dir / "tokenizer")
    vae = train_autoencoder(args, images, device)
    latents = encode(args.work_dir / "latents.pt", vae, images, device)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    latents *= vae.config.scaling_factor
    train_decoder(args, vae, images, latents, device)
    save_reconstructions(vae, images, args.work_dir / "reconstructions.png", device)
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=build_unet(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device)

    def condition(ids: torch.Tensor, picked: torch.Tensor) -> dict:
        return {"encoder_hidden_states": pipeline.text_encoder(ids).last_hidden_state}

    train_unet(args, args.work_dir / "unet.pt", pipeline, condition, latents, truths, device)


# --- SDXL ---


def random_view(picture: Image.Image, rng: Random) -> tuple[Image.Image, tuple[int, ...]]:
    """The picture, or what a trainer of SDXL would make of a photo that is not square, or of another size.

    Returns:
        `tuple`: A picture of `SIZE` x `SIZE`, and SDXL's time ids, in pixels: height and width of the original, top
        and left of the square cut from it once its shorter side was `SIZE`, height and width of that square.
    """
    if rng.random() < 0.6:
        return picture, (SIZE, SIZE, 0, 0, SIZE, SIZE)
    width, height = rng.sample([SIZE, round(SIZE * rng.uniform(0.6, 1))], 2)
    left, top = (SIZE - width) // 2, (SIZE - height) // 2
    photo = picture.crop((left, top, left + width, top + height))
    # One half loses detail. The other shows what large photos show, so that their sizes are known, too.
    scale = rng.uniform(0.25, 1) if rng.random() < 0.5 else 2 ** rng.uniform(0, 4)
    original = round(width * scale), round(height * scale)
    if scale < 1:
        photo = photo.resize(original, Image.Resampling.BOX)
    zoom = SIZE / min(width, height)
    width, height = round(width * zoom), round(height * zoom)
    left, top = rng.randint(0, width - SIZE), rng.randint(0, height - SIZE)
    view = photo.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + SIZE, top + SIZE))
    return view, (original[1], original[0], top, left, SIZE, SIZE)


def draw_views(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One `random_view` of each picture, uint8 of shape (n, 3, 64, 64), and the time ids, shape (n, 6)."""
    rng = Random("views")
    views = [random_view(Image.fromarray(image.permute(1, 2, 0).numpy()), rng) for image in images]
    pixels = torch.from_numpy(np.stack([np.asarray(view) for view, _ in views]))
    return pixels.permute(0, 3, 1, 2).contiguous(), torch.tensor([time_ids for _, time_ids in views])


def hidden_states(encoder, ids: torch.Tensor) -> torch.Tensor:
    """What SDXL reads of a text encoder: the output of the last layer but one, without the final norm."""
    return encoder(ids, output_hidden_states=True).hidden_states[-2]


def train_text_encoders(args, sd: StableDiffusionPipeline, device: str) -> tuple:
    """Two text encoders that say what that of `sd` says: the first as it is, the second through a linear map.

    Returns:
        `tuple`: The first, the second, and the weight of the map, shape (`WIDTH`, `WIDTH_2`).
    """
    torch.manual_seed(0)
    encoders = [
        build_text_encoder(sd.tokenizer, CLIPTextModel, WIDTH, layers=3),
        build_text_encoder(sd.tokenizer, CLIPTextModelWithProjection, WIDTH_2, layers=3),
    ]
    first, second, linear = (m.to(device) for m in (*encoders, torch.nn.Linear(WIDTH_2, WIDTH, bias=False)))
    path = args.work_dir / "sdxl_text_encoders.pt"
    run = Run(path, [first, second, linear], args.text_encoder_steps, 2e-3, decay_from=0.3)

    def loss_of_step() -> torch.Tensor:
        rng = Random(run.step)
        captions = ["", *(caption_of(random_look(rng), rng.choice(SCENES), rng) for _ in range(31))]
        ids = torch.tensor(sd.tokenizer(captions, padding="max_length").input_ids, device=device)
        with torch.no_grad():
            target = sd.text_encoder(ids).last_hidden_state
        return F.mse_loss(hidden_states(first, ids), target) + F.mse_loss(linear(hidden_states(second, ids)), target)

    run.train(loss_of_step, save_every=500)
    return first, second, linear.weight.detach()


def build_sdxl_unet(sd_unet: UNet2DConditionModel, linear: torch.Tensor) -> UNet2DConditionModel:
    """The U-Net of `sd` that reads two text encoders, and takes no notice of sizes and the pooled text as yet."""
    unet = UNet2DConditionModel.from_config(
        sd_unet.config,
        cross_attention_dim=WIDTH + WIDTH_2,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=WIDTH_2 + 6 * 32,
    )
    weights = unet.state_dict()
    for name, weight in sd_unet.state_dict().items():
        if weight.shape != weights[name].shape:
            # Keys and values: one half from each text encoder.
            weight = torch.cat([weight, weight @ linear], dim=1) / 2
        weights[name] = weight
    unet.load_state_dict(weights)
    torch.nn.init.zeros_(unet.add_embedding.linear_2.weight)
    torch.nn.init.zeros_(unet.add_embedding.linear_2.bias)
    return unet


def train_sdxl(args, device: str) -> None:
    sd = StableDiffusionPipeline.from_pretrained(HERE / "sd", dtype=torch.float32).to(device)
    for model in (sd.vae, sd.unet):
        # Goes into the saved configuration, where a path of this machine has no place.
        model.register_to_config(_name_or_path="sd")
    tokenizer = load_tokenizer(HERE / "sd" / "tokenizer")
    images, truths = draw_pictures(args.pictures)
    images, time_ids = draw_views(images)
    latents = encode(args.work_dir / "sdxl_latents.pt", sd.vae, images, device) * sd.vae.config.scaling_factor
    first, second, linear = train_text_encoders(args, sd, device)
    torch.manual_seed(0)
    pipeline = StableDiffusionXLPipeline(
        vae=sd.vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=build_sdxl_unet(sd.unet, linear),
        scheduler=sd.scheduler,
        # Without a prompt: the empty caption, as in `sd`, and no zeros.
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )

    def condition(ids: torch.Tensor, picked: torch.Tensor) -> dict:
        pooled = second(ids, output_hidden_states=True)
        hidden = torch.cat([hidden_states(first, ids), pooled.hidden_states[-2]], dim=-1)
        added = {"text_embeds": pooled.text_embeds, "time_ids": time_ids[picked].to(device)}
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": added}

    train_unet(args, args.work_dir / "sdxl_unet.pt", pipeline, condition, latents, truths, device)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the tiny Stable Diffusion, or SDXL, of the drawn world.")
    parser.add_argument("--sdxl", action="store_true", help="Train SDXL, from the finished sd/ beside this file.")
    parser.add_argument("--output_dir", type=Path, default=HERE / "sd", help="Folder of the finished pipeline.")
    parser.add_argument("--work_dir", type=Path, default=HERE / "run", help="Folder of logs and resumable states.")
    parser.add_argument("--pictures", type=int, default=60_000, help="How many pictures to draw and learn from.")
    parser.add_argument("--autoencoder_steps", type=int, default=2500)
    parser.add_argument("--decoder_steps", type=int, default=3000, help="More steps of the decoder alone.")
    parser.add_argument("--text_encoder_steps", type=int, default=1000, help="Steps of SDXL's text encoders alone.")
    parser.add_argument("--steps", type=int, default=12_000, help="Steps of the U-Net with its text encoders.")
    parser.add_argument("--batch_size", type=int, default=32, help="Pictures a step of the U-Net.")
    parser.add_argument("--learning_rate", type=float, default=8e-4)
    parser.add_argument("--decay_from", type=float, default=0.7, help="Share of --steps at the full learning rate.")
    parser.add_argument("--save_every", type=int, default=1000, help="Steps between two resumable states.")
    if parser.parse_known_args()[0].sdxl:
        # It starts where sd/ ended.
        parser.set_defaults(output_dir=HERE / "sdxl", pictures=30_000, steps=1000, learning_rate=4e-4)
        parser.set_defaults(decay_from=0.3, save_every=250)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (train_sdxl if args.sdxl else train_sd)(args, device)


if __name__ == "__main__":
    main()
