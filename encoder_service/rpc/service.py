"""Puts the front together."""

import grpc.aio

from encoder_service.prompt import Tokenizer, read_row_limit
from encoder_service.rpc.encode import EncoderServicer
from zimage_core.formats.encoder_files import EncoderFiles
from zimage_core.serving.server import Beside, OnReady, Service
from zimage_core.serving.worker import Worker
from zimage_core.settings import EncoderSettings
from zimage_rpc.encoder.v1 import encoder_pb2, encoder_pb2_grpc


def service(settings: EncoderSettings) -> Service:
    """The encoder service with these settings; raises InvalidModel when the front cannot work with
    the model folder."""
    files = EncoderFiles.of(settings.model, settings.tokenizer)
    tokenizer = Tokenizer(files.tokenizer)
    row_limit = settings.row_limit or read_row_limit(settings.model)

    def register(server: grpc.aio.Server, on_ready: OnReady) -> Beside:
        worker = Worker("encoder_service.engine.worker:main", settings, settings.watchdog, on_ready)
        servicer = EncoderServicer(worker, tokenizer, settings, row_limit)
        encoder_pb2_grpc.add_EncoderServiceServicer_to_server(servicer, server)
        return worker.supervise

    return Service(
        name=encoder_pb2.DESCRIPTOR.services_by_name["EncoderService"].full_name,
        register=register,
    )
