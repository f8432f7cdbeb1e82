"""transformers' own common tests, on this project's classes; test_modeling_mobilenet_v2.py there was the model."""

from __future__ import annotations

import copy
import unittest
from typing import Any
from unittest import mock

import pytest
import torch
import transformers_suite
from transformers.modeling_outputs import SemanticSegmenterOutput

from mobilenet import (
    MobileNetBackbone,
    MobileNetConfig,
    MobileNetForImageClassification,
    MobileNetImageProcessor,
    MobileNetModel,
)


if reason := transformers_suite.unfit():
    pytest.skip(reason, allow_module_level=True)
if not transformers_suite.is_there():
    reason = f"no common tests in {transformers_suite.folder()}: run python tests/transformers_suite.py"
    pytest.skip(reason, allow_module_level=True)

backbone, configuration, image_processing, modeling = transformers_suite.load()


class Networks:
    """What the common tests ask of a model's tester: a small network, and images for it."""

    batch_size = 3
    is_training = True

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def get_config(self) -> MobileNetConfig:
        """A new configuration: some tests change it."""
        return MobileNetConfig(
            architecture=self.architecture,
            width_multiplier=0.25,
            image_size=32,
            num_labels=3,
            out_features=["stage2", "stage4"],
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[MobileNetConfig, dict[str, torch.Tensor]]:
        """A configuration, and the arguments of a network's call."""
        return self.get_config(), {"pixel_values": torch.rand(self.batch_size, 3, 32, 32)}


class ModelTests(modeling.ModelTesterMixin):
    """The tests of a model, on every class of an architecture."""

    architecture: str
    all_model_classes = (MobileNetModel, MobileNetForImageClassification, MobileNetBackbone)
    has_attentions = False
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        self.model_tester = Networks(self.architecture)

    def test_config(self) -> None:
        """The tests of a configuration."""
        configuration.ConfigTester(
            self,
            config_class=MobileNetConfig,
            has_text_modality=False,
            common_properties=["num_channels", "num_hidden_layers", "depths"],
            architecture=self.architecture,
            width_multiplier=0.5,
        ).run_common_tests()

    @pytest.mark.slow
    def test_bc_torch_dtype(self) -> None:
        """Theirs, which takes over ten seconds."""
        super().test_bc_torch_dtype()

    def test_hidden_states_output(self) -> None:
        """Theirs takes hidden states for sequences; these are feature maps, of the stem and of every block."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        configured = copy.deepcopy(config)
        configured.output_hidden_states = True
        for model_class in self.all_model_classes:
            for model, arguments in (
                (model_class(config), {"output_hidden_states": True}),
                (model_class(configured), {}),
            ):
                maps = model.eval()(**inputs, **arguments).hidden_states
                assert len(maps) == config.num_hidden_layers + 1
                assert maps[0].shape == (self.model_tester.batch_size, config.stem_block.out_channels, 16, 16)
                assert maps[-1].shape[-2:] == (1, 1)


MODEL_LEFT_OUT = {
    "there is no attention": (
        "test_attention_outputs",
        "test_attn_implementation_composite_models",
        "test_can_set_attention_dynamically*",
        "test_eager_matches_sdpa_inference*",
        "test_flash_attn_*",
        "test_flex_attention_with_grads",
        "test_sdpa_can_*",
        "test_sliding_window_mask",
    ),
    "there are no rotary embeddings": ("test_model_rope_*", "test_vision_axial_rope"),
    "there are no embeddings, of tokens, patches or positions": (
        "test_enable_input_require_grads_with_gradient_checkpointing",
        "test_inputs_embeds*",
        "test_model_get_set_embeddings",
        "test_resize_*",
    ),
    "it is no language model": (
        "test_causal_lm_loss_honors_shift_labels",
        "test_encoder_decoder_loss_no_double_shift",
        "test_multimodal_outputs_are_returned",
    ),
    "there are no experts": (
        "test_eager_matches_batched_and_grouped_inference*",
        "test_moe_models_record_router_logits",
        "test_output_router_logits_from_config",
    ),
    "the configuration holds no other": ("test_internal_model_config_and_subconfig_are_same",),
    "no parameter must stay in float32": ("test_keep_in_fp32_modules*",),
    "no parameter is renamed on loading": ("test_can_load_from_already_mapped_keys", "test_reverse_loading_mapping"),
    "there is no plan for tensor parallelism": ("test_tp_plan_matches_params",),
    # That came with transformers 5.2.
    "forward collects the hidden states itself, without capture_outputs": (
        "test_can_capture_specific_layers_hidden_states",
        "test_capture_outputs_decorator",
    ),
    "it needs an accelerator": (
        "test_can_load_with_device_context_manager",
        "test_can_load_with_global_device_set",
        "test_cpu_offload",
        "test_disk_offload_*",
        "test_kernels_can_load_without_crashing",
        "test_model_parallelism",
        "test_torch_compile_for_training",
    ),
}


@transformers_suite.leave_out(MODEL_LEFT_OUT)
class TestMobileNetV1(ModelTests, unittest.TestCase):
    architecture = "mobilenet_v1"


@transformers_suite.leave_out(MODEL_LEFT_OUT)
class TestMobileNetV2(ModelTests, unittest.TestCase):
    architecture = "mobilenet_v2"


class BackboneTests(backbone.BackboneTesterMixin):
    """The tests of a backbone."""

    architecture: str
    all_model_classes = (MobileNetBackbone,)
    config_class = MobileNetConfig
    has_attentions = False

    def setUp(self) -> None:
        self.model_tester = Networks(self.architecture)


class TestMobileNetV1Backbone(BackboneTests, unittest.TestCase):
    architecture = "mobilenet_v1"


class TestMobileNetV2Backbone(BackboneTests, unittest.TestCase):
    architecture = "mobilenet_v2"


class Images(image_processing.ImageProcessingTester):
    """What the common tests ask of an image processor's tester."""

    def __init__(self, parent: unittest.TestCase, **kwargs: Any) -> None:
        kwargs = {
            "min_resolution": 20,
            "max_resolution": 60,
            "size": {"shortest_edge": 24},
            "crop_size": {"height": 18, "width": 20},
            "image_mean": [0.4, 0.5, 0.6],
            "image_std": [0.7, 0.8, 0.9],
            **kwargs,
        }
        super().__init__(parent, **kwargs)

    def prepare_post_process_semantic_segmentation_inputs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        logits = torch.randn(self.batch_size, 5, 6, 7)
        return {"outputs": SemanticSegmenterOutput(logits=logits)}, {"num_labels": 5, "height": 6, "width": 7}

    def _get_image_processing_classes(self) -> dict[str, type]:
        return {"pil": MobileNetImageProcessor}


@transformers_suite.leave_out(
    {
        "there is one backend, Pillow's, with torchvision and without": (
            "test_backends_equivalence*",
            "test_can_compile_torchvision_backend",
            "test_fast_image_processor_explicit_none_preserved",
            "test_new_models_require_torchvision_backend",
            "test_pil_can_run_without_torchvision",
            "test_save_load_backends*",
        ),
        "an unknown option is an error here; the test expects a warning": (
            "test_image_processor_preprocess_arguments",
        ),
    }
)
class TestMobileNetImageProcessor(
    image_processing.PostProcessSemanticSegmentationTestMixin,
    image_processing.ImageProcessingTestMixin,
    unittest.TestCase,
):
    image_processor_tester_class = Images
    test_cast_dtype = True

    def setUp(self) -> None:
        super().setUp()
        # One test does nothing where it finds this on instances only.
        patch = mock.patch.object(MobileNetImageProcessor, "do_convert_rgb", True, create=True)
        patch.start()
        self.addCleanup(patch.stop)
