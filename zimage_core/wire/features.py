"""What a version can do that another may not, in words that Describe lists and that stay."""

DIT = (
    "shared_steps",
    "receipts",
    "previews",
    "encode_images",
    "decode_latents",
    "blobs",
    "priorities",
    "named_embeddings",
    "trace",
    "adapters",
    "train_lora",
)
TRAINER = ("lora",)
ENCODER = ("encode_stream", "packing", "blends", "long_prompts", "count_tokens", "encode_session")
