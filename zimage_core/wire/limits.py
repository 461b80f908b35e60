"""Sizes and times that both ends of a connection agree on, and the channel options for them."""

MESSAGE_BYTES = 32 << 20
"""The largest message: two embeddings of 1504 tokens in float32 are 29.4 MiB."""

ENVELOPE_BYTES = 1024
"""More than everything in a message but its one large field."""

CHUNK_BYTES = 1 << 20
"""The largest piece of a file on the wire."""

INLINE_BYTES = 64 << 10
"""Elements of an embedding up to here go with the request: they fit the window of a connection that
is fresh. Larger ones go where they are needed, for the same round trip, and only once."""

PROMPTS_PER_ENCODE = 32
"""The most prompts in one Encode."""

PROMPT_BYTES = 1 << 20
"""The longest text in one prompt, all parts together."""

ADAPTERS_PER_REQUEST = 16
"""The most adapters that change one picture."""

DIGESTS_PER_FIND = 1000
"""The most blobs in one Find."""

UNARY_ATTEMPTS = 5
"""The most attempts of a unary call that may be repeated; gRPC clamps more to this."""

KEEPALIVE_SECONDS = 10
KEEPALIVE_TIMEOUT_SECONDS = 5
SERVER_PERMITS_PING_SECONDS = 5

_MESSAGE_SIZES = (
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
)
_KEEPALIVE = (
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.http2.max_pings_without_data", 0),  # no limit; after two gRPC would take a minute each
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    # While a ping of another kind is under way, as behind every burst of data, none is sent to keep
    # the connection alive; that ping must fail as soon, and not after gRPC's own minute.
    ("grpc.http2.ping_timeout_ms", (KEEPALIVE_SECONDS + KEEPALIVE_TIMEOUT_SECONDS) * 1000),
)

SERVER_OPTIONS = (
    *_MESSAGE_SIZES,
    *_KEEPALIVE,
    ("grpc.http2.min_ping_interval_without_data_ms", SERVER_PERMITS_PING_SECONDS * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),  # a port that is taken is an error, not a second server behind it
)

_RETRY = {
    "maxAttempts": UNARY_ATTEMPTS,
    "initialBackoff": "0.2s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}

SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [
                {"service": "zimage_rpc.encoder.v1.EncoderService", "method": "Encode"},
                {"service": "zimage_rpc.encoder.v1.EncoderService", "method": "CountTokens"},
                {"service": "zimage_rpc.encoder.v1.EncoderService", "method": "Describe"},
                {"service": "zimage_rpc.dit.v1.DitService", "method": "Describe"},
                {"service": "zimage_rpc.dit.v1.DitService", "method": "AddAdapter"},
                {"service": "zimage_rpc.dit.v1.DitService", "method": "GetAdapter"},
                {"service": "zimage_rpc.dit.v1.DitService", "method": "ListAdapters"},
                {"service": "zimage_rpc.blob.v1.BlobService", "method": "Find"},
            ],
            "retryPolicy": _RETRY,
        }
    ],
}
"""No streams on purpose: the SDK replays them, and two retry machines multiply attempts."""

CHANNEL_OPTIONS = (
    *_MESSAGE_SIZES,
    *_KEEPALIVE,
    ("grpc.per_rpc_retry_buffer_size", MESSAGE_BYTES),  # larger calls would silently not be retried
    ("grpc.initial_reconnect_backoff_ms", 200),
    # Beside its name, how long an attempt to connect may take: TCP, TLS and the first frames need
    # four round trips, which are 2.4 s by satellite.
    ("grpc.min_reconnect_backoff_ms", 3000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
