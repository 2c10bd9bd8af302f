"""The demo: a very small ViT on windows of 14 photographs, a minute or two on two CPU cores.

    dinov3 demo            # or dinov3 demo --quick; the stages after it are in demo_stages.py

Every number is chosen for a few hundred steps; nothing here is from the paper. What got a short run off the ground
(DINO loss at step 50, ln K = 4.16): few prototypes and sharp temperatures 4.01, mild views as well 3.39.
Held-out k-NN (k = 10, 14 classes, 336 windows, seed 0): .637 untrained, .72 at step 249, .68 after 500; on another
machine .76 and .74 after 600: the standard error is .025. Some 145 images/s on two AMX cores, 95 on two Zen 4 cores.
"""

from ..config import Backbone, Config, Crops, Data, Head, Losses, Optimizer, Rope, Run


def demo() -> Config:
    head = Head(hidden=256, bottleneck=64, prototypes=64)
    return Config(
        recipe="demo",
        backbone=Backbone(
            name="vit_demo",
            embed_dim=128,
            depth=4,
            heads=2,
            patch_size=8,
            layer_scale=1.0,
            rope=Rope(rescale=None),
        ),
        dino_head=head,
        ibot_head=head,
        crops=Crops(
            locals=2,
            global_size=64,
            local_size=32,
            global_scale=(0.4, 1.0),
            local_scale=(0.15, 0.5),
            color_jitter=(0.2, 0.2, 0.1, 0.05),
            grayscale=0.1,
            solarize=0.0,
        ),
        data=Data(workers=1),
        losses=Losses(student_temperature=0.05, teacher_temperature=0.02, teacher_temperature_start=0.02),
        optimizer=Optimizer(
            lr=1e-3,
            lr_rule="none",
            lr_end=1e-5,
            warmup=30,
            patch_embed_multiplier=1.0,
            momentum=0.92,
            momentum_end=0.99,
        ),
        run=Run(steps=500, minutes=3.5, batch_size=32, log_every=5, tensorboard=False),
    )
