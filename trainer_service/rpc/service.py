"""Puts the service together."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc.aio

from trainer_service.caches import Caches
from trainer_service.desk import Desk
from trainer_service.jobs.database import Database
from trainer_service.jobs.jobs import Jobs
from trainer_service.rpc.jobs import TrainerServicer
from trainer_service.running import Runner
from zimage_client import AsyncClient
from zimage_core.serving.blobs import BlobServicer
from zimage_core.serving.server import Beside, OnReady, Service
from zimage_core.settings import TrainerSettings
from zimage_core.store.blobs import Blobs
from zimage_core.wire.addresses import several
from zimage_rpc.blob.v1 import blob_pb2, blob_pb2_grpc
from zimage_rpc.trainer.v1 import trainer_pb2, trainer_pb2_grpc

_THREADS = 4


def service(settings: TrainerSettings) -> Service:
    """The trainer service with these settings."""
    client = AsyncClient(settings.dit, settings.encoder, **settings.credentials)
    dits = tuple(AsyncClient(one, **settings.credentials) for one in several(settings.dit))
    blobs = Blobs(*settings.store_at, settings.store_quota_bytes, settings.store_keep_seconds)
    threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="desk")
    database = Database(settings.database_url)
    desk = Desk(Jobs(database), blobs, client, dits, Caches(blobs, client, threads), threads)

    runner = Runner(desk, database, settings.jobs_at_once or len(dits))

    def register(server: grpc.aio.Server, on_ready: OnReady) -> Beside:
        trainer_pb2_grpc.add_TrainerServiceServicer_to_server(TrainerServicer(desk, runner), server)
        blob_pb2_grpc.add_BlobServiceServicer_to_server(BlobServicer(blobs), server)
        return partial(runner.run, on_ready)

    return Service(
        name=trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"].full_name,
        register=register,
        also=[blob_pb2.DESCRIPTOR.services_by_name["BlobService"].full_name],
        leave=runner.leave,
        neighbours=[client, *dits],
    )
