"""The kinds of this package: one line each is all that a new kind changes here. See `kinds.py` for what a line says."""

from __future__ import annotations

from megatron_ove.config.data import DocumentSourceConfig, ImageSourceConfig, OcrSourceConfig, VideoSourceConfig
from megatron_ove.config.encoder import EncoderConfig
from megatron_ove.config.objectives import PartialFCConfig
from megatron_ove.config.reconstruction import FeatureReconstructionConfig, PixelReconstructionConfig
from megatron_ove.config.text_generation import TextGenerationConfig
from megatron_ove.config.token_alignment import TokenAlignmentConfig
from megatron_ove.kinds import EncoderKind, ObjectiveKind, SourceKind, lazily

ENCODERS = {
    "onevision": EncoderKind(
        config=EncoderConfig,
        build=lazily("megatron_ove.model.encoder:build_encoder_chunks"),
        footprint=lazily("megatron_ove.planning.vit_footprint:VitFootprint"),
        operations=lazily("megatron_ove.model.operations:encoder_operations"),
        identity=(
            "hidden_size",
            "num_layers",
            "num_attention_heads",
            "ffn_hidden_size",
            "patch_size",
            "layer_norm_epsilon",
            "rope_theta",
            "rope_temporal_size",
            "use_head",
            "final_norm",
        ),
        before_layers=("encoder.patch_embed", "encoder.layernorm_pre"),
        exchange=lazily("megatron_ove.convert.exchange:OneVisionExchange"),
    ),
}

OBJECTIVES = {
    "partial_fc": ObjectiveKind(
        config=PartialFCConfig,
        build=lazily("megatron_ove.objectives.partial_fc:build_partial_fc"),
        footprint=lazily("megatron_ove.planning.class_tables:PartialFCFootprint"),
        fill_in=lazily("megatron_ove.objectives.label_fit:class_count_of"),
        find_mismatches=lazily("megatron_ove.objectives.label_fit:find_mismatches"),
        find_doubts=lazily("megatron_ove.objectives.label_fit:find_doubts"),
        find_held_out_mismatches=lazily("megatron_ove.objectives.label_fit:find_held_out_mismatches"),
        differences=lazily("megatron_ove.objectives.label_fit:stored_differences"),
        exact_fields=("labels_per_step", "sample_rate", "num_sampled", "negatives", "negative_groups", "regions"),
        chance_loss=lazily("megatron_ove.objectives.chance:chance_loss"),
        describe=lazily("megatron_ove.objectives.label_fit:describe"),
    ),
    "text_generation": ObjectiveKind(
        config=TextGenerationConfig,
        build=lazily("megatron_ove.objectives.text_generation.objective:TextGeneration"),
        footprint=lazily("megatron_ove.planning.text_decoder:TextGenerationFootprint"),
        budgets=lazily("megatron_ove.objectives.text_generation.fit:budgets"),
        fill_in=lazily("megatron_ove.objectives.text_generation.fit:decoder_of"),
        find_mismatches=lazily("megatron_ove.objectives.text_generation.fit:find_mismatches"),
        find_doubts=lazily("megatron_ove.objectives.text_generation.fit:find_doubts"),
        find_held_out_mismatches=lazily("megatron_ove.objectives.text_generation.fit:find_held_out_mismatches"),
        differences=lazily("megatron_ove.objectives.text_generation.fit:stored_differences"),
        exact_fields=("texts", "max_text_tokens", "template", "instructions"),
        describe=lazily("megatron_ove.objectives.text_generation.fit:describe"),
    ),
    "feature_reconstruction": ObjectiveKind(
        config=FeatureReconstructionConfig,
        build=lazily("megatron_ove.objectives.reconstruction.objectives:FeatureReconstruction"),
        footprint=lazily("megatron_ove.planning.reconstruction:FeatureReconstructionFootprint"),
        fill_in=lazily("megatron_ove.objectives.reconstruction.fit:teacher_of"),
        find_mismatches=lazily("megatron_ove.objectives.reconstruction.fit:find_teacher_mismatches"),
        find_held_out_mismatches=lazily("megatron_ove.objectives.reconstruction.fit:no_held_out_mismatches"),
        differences=lazily("megatron_ove.objectives.reconstruction.fit:teacher_differences"),
        describe=lazily("megatron_ove.objectives.reconstruction.fit:describe_features"),
    ),
    "token_alignment": ObjectiveKind(
        config=TokenAlignmentConfig,
        build=lazily("megatron_ove.objectives.token_alignment.objective:TokenAlignment"),
        footprint=lazily("megatron_ove.planning.token_alignment:TokenAlignmentFootprint"),
        fill_in=lazily("megatron_ove.objectives.token_alignment.fit:table_of"),
        find_mismatches=lazily("megatron_ove.objectives.token_alignment.fit:find_mismatches"),
        find_held_out_mismatches=lazily("megatron_ove.objectives.token_alignment.fit:find_held_out_mismatches"),
        differences=lazily("megatron_ove.objectives.token_alignment.fit:stored_differences"),
        exact_fields=("unit", "max_tokens"),
        describe=lazily("megatron_ove.objectives.token_alignment.fit:describe"),
    ),
    "pixel_reconstruction": ObjectiveKind(
        config=PixelReconstructionConfig,
        build=lazily("megatron_ove.objectives.reconstruction.objectives:PixelReconstruction"),
        footprint=lazily("megatron_ove.planning.reconstruction:PixelReconstructionFootprint"),
        find_held_out_mismatches=lazily("megatron_ove.objectives.reconstruction.fit:no_held_out_mismatches"),
        describe=lazily("megatron_ove.objectives.reconstruction.fit:describe_pixels"),
    ),
}

SOURCES = {
    "image": SourceKind(
        config=ImageSourceConfig,
        build=lazily("megatron_ove.data.sources.images:ImageSource"),
        shard_kind="image",
        whole_samples=lambda path, image_size, max_patches: ImageSourceConfig(
            kind="image", path=path, image_size=image_size
        ),
    ),
    "ocr": SourceKind(
        config=OcrSourceConfig,
        build=lazily("megatron_ove.data.sources.pages:OcrSource"),
        shard_kind="ocr",
        whole_samples=lambda path, image_size, max_patches: OcrSourceConfig(
            kind="ocr", path=path, max_patches=max_patches
        ),
    ),
    "document": SourceKind(
        config=DocumentSourceConfig,
        build=lazily("megatron_ove.data.sources.documents:DocumentSource"),
        shard_kind="document",
        find_mismatches=lazily("megatron_ove.data.sources.documents:find_mismatches"),
        whole_samples=lazily("megatron_ove.data.sources.documents:whole_samples"),
    ),
    "video": SourceKind(
        config=VideoSourceConfig,
        build=lazily("megatron_ove.data.sources.clips:VideoSource"),
        shard_kind="video",
        find_mismatches=lazily("megatron_ove.data.sources.clips:find_mismatches"),
        whole_samples=lambda path, image_size, max_patches: VideoSourceConfig(
            kind="video", path=path, max_patches=max_patches
        ),
    ),
}
