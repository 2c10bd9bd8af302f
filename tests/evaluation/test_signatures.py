"""Signs of degradation: healthy histories give none, each spoiled one names its cause and its remedy, once."""

import pytest

from dinov3_train.evaluation.panel import PanelFeatures, measures
from dinov3_train.evaluation.signatures import MEASURES, RULES, all_signs, signs

# the looks of a vit_tiny_cpu run on caltech101, steps 0 to 1951 (dinov3 health history=true)
HEALTHY = {
    "step": (0, 200, 400, 800, 1200, 1951),
    "locality": (0.362, 0.492, 0.583, 0.623, 0.637, 0.644),
    "patch_similarity": (0.618, 0.779, 0.667, 0.583, 0.520, 0.489),
    "cls_patch_similarity": (0.546, 0.641, 0.485, 0.431, 0.394, 0.323),
    "image_similarity": (0.477, 0.193, 0.145, 0.098, 0.081, 0.056),
    "norm_outliers": (0.0,) * 6,
    "dimension_peak": (1.91, 2.03, 1.75, 1.92, 1.87, 1.95),
    "patch_rank": (15.6, 11.9, 14.7, 19.0, 21.2, 24.3),
    "resolution_agreement": (0.883, 0.950, 0.934, 0.921, 0.919, 0.923),
    "dino_information": (0.30, 0.17, 0.19, 0.20, 0.24, 0.28),
    "dino_entropy": (0.60, 0.91, 0.89, 0.88, 0.86, 0.84),
    "ibot_information": (0.23, 0.25, 0.29, 0.33, 0.38, 0.42),
    "ibot_entropy": (0.54, 0.69, 0.63, 0.59, 0.56, 0.53),
}
ROWS = [dict(zip(HEALTHY, values)) for values in zip(*HEALTHY.values())]

SPOILED = {
    "patch similarities turn to noise": ({"locality": 0.4}, ("dinov3 refine", "around step 1951", "0.40, 0.64")),
    "CLS and patches grow alike": ({"cls_patch_similarity": 0.62}, ("dinov3 refine", "0.62, 0.32 at step 1951")),
    "patches all alike": ({"patch_similarity": 0.97}, ("losses.ibot",)),
    "images all alike": ({"image_similarity": 0.99}, ("losses.koleo",)),
    "few directions": ({"patch_rank": 9.0}, ("losses.koleo", "24.3 at step 1951")),
    "patches of outlying norm": ({"norm_outliers": 0.02}, ("2.0 %", "backbone.registers=4")),
    "dimension of outlying size": ({"dimension_peak": 50.0}, ("norm=True",)),
    "DINO prototypes collapse": ({"dino_information": 0.001, "dino_entropy": 0.1}, ("same answer", "losses.koleo")),
    "iBOT prototypes collapse": ({"ibot_information": 0.001, "ibot_entropy": 0.99}, ("losses.teacher_temperature",)),
    "features change with resolution": ({"resolution_agreement": 0.6}, ("dinov3 adapt", "0.60")),
}


def test_a_healthy_history_is_silent():
    assert all_signs(ROWS) == []


def test_every_rule_is_spoiled_once():
    assert SPOILED.keys() == RULES.keys()


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_look_names_its_cause_and_remedy(name):
    change, parts = SPOILED[name]
    spoiled = ROWS[-1] | change | {"step": 2200}
    found = signs([*ROWS, spoiled])
    assert [sign.name for sign in found] == [name]
    assert found[0].step == 2200
    for part in ("step 2200: ", "Remedy: ", *parts):
        assert part in found[0].text
    assert "\n" not in found[0].text
    again = all_signs([*ROWS, spoiled, spoiled | {"step": 2400}, ROWS[-1] | {"step": 2600}, spoiled | {"step": 2800}])
    assert [sign.step for sign in again] == [2200, 2800]


def test_untrained_and_unsettled_looks_are_not_judged():
    bad = {"step": 0, "locality": 0.0, "image_similarity": 1.0, "patch_similarity": 1.0}
    assert signs([bad]) == []
    assert signs([bad, bad | {"step": 100}], settled=100) == []
    assert len(signs([bad, bad | {"step": 101}], settled=100)) == 3


def test_what_is_bad_but_on_its_way_is_not_a_sign():
    rows = [{"step": 200, "image_similarity": 0.99}, {"step": 400, "image_similarity": 0.97}]
    assert signs(rows[:1])
    assert signs(rows) == []
    assert signs([*rows, {"step": 600, "image_similarity": 0.98}])


def test_every_measure_is_explained():
    import torch

    features = PanelFeatures(cls=torch.randn(3, 8), patches=torch.randn(3, 2, 2, 8), raw=torch.randn(3, 2, 2, 8),
                             finer=torch.randn(3, 4, 4, 8))  # fmt: skip
    heads = {"dino_head": torch.nn.Linear(8, 5), "ibot_head": torch.nn.Linear(8, 5)}
    found = measures(features, heads=heads, start=features.patches, previous=features.patches)
    assert found.keys() == MEASURES.keys()
