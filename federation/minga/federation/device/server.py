"""Puts one device together and runs it: the agent and the local inference server."""

import gc
import json
import logging
from contextlib import AsyncExitStack
from functools import partial

from minga.federation.device.agent import Agent
from minga.federation.device.enrolment import CoordinatorAddress
from minga.federation.device.keepsakes import Keepsakes
from minga.federation.device.link import Link
from minga.federation.device.metrics import Metrics
from minga.federation.device.queries import Queries
from minga.federation.device.settings import DeviceSettings
from minga.federation.device.slots import ModelSlots
from minga.federation.device.trainer_process import TrainerProcess
from minga.federation.durable import replace_file
from minga.federation.identity import load_identity, save_identity
from minga.federation.memory import keep_freed_memory
from minga.inference.app import InferenceApp
from minga.inference.grpc_server import GrpcServer
from minga.inference.monitor.keeper import Keeper
from minga.inference.monitor.observer import Observer
from minga.inference.repository import ModelRepository
from minga.inference.server import Server

_log = logging.getLogger(__name__)

ENDPOINTS_FILE = "endpoints.json"
"""Written into the device's folder: where its local server and metrics listen."""

_FLUSH_S = 5.0  # a device's disk is slower than a server's, and its traffic thinner


async def run(settings: DeviceSettings) -> None:
    """Run a device until cancelled.

    Raises:
        IdentityError: the folder holds no identity, or the coordinator refuses it.
        PortInUseError: one of the ports is taken.
        AccessError: the local server would not be protected as it has to be.
    """
    protection = settings.protection
    protection.check(settings.host)
    access, tls = protection.access(), protection.tls()
    keep_freed_memory()
    models = ModelRepository()
    metrics = Metrics()
    trainer = None
    if settings.trainer:
        trainer = TrainerProcess(settings.trainer, settings.trainer_options)
    agent = Agent(
        link=Link(
            CoordinatorAddress.load(settings.folder).device_address,
            load_identity(settings.folder),
            keep=partial(save_identity, settings.folder),
        ),
        trainer=trainer,
        slots=ModelSlots(settings.folder / "models"),
        models=models,
        metrics=metrics,
        keepsakes=Keepsakes(settings.folder / "learning") if trainer else None,
        allow_plain=settings.allow_plain,
        min_noise=settings.min_noise,
        min_summed=settings.min_summed,
        queries=Queries(
            columns=frozenset(settings.query_columns), min_cohort=settings.query_min_cohort
        ),
        compress=settings.compress,
    )
    async with AsyncExitStack() as stack:
        keeper = stack.enter_context(Keeper(settings.folder / "monitor"))
        observer = stack.enter_context(Observer(keeper, flush_s=_FLUSH_S))
        app = InferenceApp(models, registry=metrics.registry, access=access, observer=observer)
        server = await stack.enter_async_context(
            Server(app, host=settings.host, port=settings.port, tls=tls)
        )
        endpoints = {"inference": server.url, "metrics": f"{server.url}/metrics"}
        if settings.grpc_port is not None:
            grpc = GrpcServer(app.service, host=settings.host, port=settings.grpc_port, tls=tls)
            endpoints["grpc"] = (await stack.enter_async_context(grpc)).url
        replace_file(settings.folder / ENDPOINTS_FILE, json.dumps(endpoints).encode())
        _log.info("models: %s", server.url)
        gc.freeze()  # what is loaded stays; looking through it again costs rounds their time
        await agent.run()
