"""Puts the front together."""

import grpc.aio

from dit_service.rpc.adapters import Adapters
from dit_service.rpc.conditioning import Conditioner
from dit_service.rpc.generate import DitServicer
from dit_service.rpc.training import TrainingServicer
from zimage_client import AsyncClient
from zimage_core.serving.blobs import BlobServicer
from zimage_core.serving.server import Beside, OnReady, Service
from zimage_core.serving.worker import Worker
from zimage_core.settings import DitSettings
from zimage_core.store.blobs import Blobs
from zimage_rpc.blob.v1 import blob_pb2, blob_pb2_grpc
from zimage_rpc.dit.v1 import dit_pb2, dit_pb2_grpc, training_pb2, training_pb2_grpc


def service(settings: DitSettings) -> Service:
    """The DiT service with these settings."""

    encoder = (
        AsyncClient(encoder=settings.encoder, **settings.encoder_credentials)
        if settings.encoder
        else None
    )

    blobs = Blobs(*settings.store_at, settings.store_quota_bytes, settings.store_keep_seconds)
    trainings: list[TrainingServicer] = []

    async def leave() -> None:
        for servicer in trainings:
            await servicer.leave()

    def register(server: grpc.aio.Server, on_ready: OnReady) -> Beside:
        worker = Worker("dit_service.engine.worker:main", settings, settings.watchdog, on_ready)
        keeper = BlobServicer(blobs)
        servicer = DitServicer(
            worker, settings, Conditioner(settings, encoder), keeper, Adapters(blobs)
        )
        dit_pb2_grpc.add_DitServiceServicer_to_server(servicer, server)
        trainings.append(TrainingServicer(worker, blobs, settings.training_weight))
        training_pb2_grpc.add_TrainingServiceServicer_to_server(trainings[-1], server)
        blob_pb2_grpc.add_BlobServiceServicer_to_server(keeper, server)
        return worker.supervise

    return Service(
        name=dit_pb2.DESCRIPTOR.services_by_name["DitService"].full_name,
        register=register,
        also=[
            training_pb2.DESCRIPTOR.services_by_name["TrainingService"].full_name,
            blob_pb2.DESCRIPTOR.services_by_name["BlobService"].full_name,
        ],
        leave=leave,
        neighbours=[encoder] if encoder else [],
    )
