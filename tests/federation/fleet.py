"""A coordinator and devices in one process, over real gRPC, for tests."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np

from minga.federation import transport
from minga.federation.coordinator.server import Coordinator
from minga.federation.coordinator.settings import CoordinatorSettings
from minga.federation.device.agent import Agent
from minga.federation.device.enrolment import CoordinatorAddress, enrol
from minga.federation.device.keepsakes import Keepsakes
from minga.federation.device.link import Link
from minga.federation.device.metrics import Metrics
from minga.federation.device.slots import ModelSlots
from minga.federation.device.trainer_process import TrainerProcess
from minga.federation.identity import Clock, load_identity, save_identity, utc_now
from minga.federation.operator import Operator, connect
from minga.federation.parameters import Parameters, to_bytes
from minga.federation.trainer import Scalar
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc
from minga.inference.repository import ModelRepository

Stream = grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse]
TRAINERS = Path(__file__).parent / "device"
PATIENCE_S = 60.0


def campaign_plan(**changes: object) -> pb.CampaignPlan:
    """Give a plan that suits a handful of devices."""
    values: dict[str, object] = {
        "model_name": "toy",
        "num_rounds": 1,
        "cohort": 4,
        "min_cohort": 3,
        "value_bits": 16,
        "clip": 1.0,
        "max_weight": 100,
        "server_learning_rate": 1.0,
        "invite_timeout_s": 20.0,
        "stage_timeout_s": 20.0,
        "training_timeout_s": 30.0,
        "expected_dropout": 0.25,
        "colluder_share": 0.0,
        **changes,
    }
    return pb.CampaignPlan(**values)  # type: ignore[arg-type]


def toy_model(size: int = 1000) -> Parameters:
    """Give a model of two tensors."""
    return {
        "w": np.zeros((size // 10, 10), np.float32),
        "b": np.ones(7, np.float32),
    }


def add_to_path(folder: Path) -> None:
    """Let child processes import from a folder too."""
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(folder) not in folders:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, folders)])


class Fleet:
    """One coordinator and some devices; everything ends with the context."""

    def __init__(
        self,
        folder: Path,
        *,
        clock: Callable[[], float] = time.time,
        certificate_clock: Clock = utc_now,
        **settings: object,
    ) -> None:
        self.folder = folder
        self.clock = clock
        self.certificate_clock = certificate_clock
        self.settings = settings
        self.ports = {"port": 0, "enrol_port": 0}
        self._stack = AsyncExitStack()
        self._coordinator_stack = AsyncExitStack()
        self._agents: dict[str, asyncio.Task[None]] = {}
        self.models: dict[str, ModelRepository] = {}
        self.metrics: dict[str, Metrics] = {}
        self.trainers: dict[str, TrainerProcess] = {}

    async def __aenter__(self) -> Self:
        await self.start_coordinator()
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            for name in list(self._agents):
                await self.stop_device(name)
            await self._stack.aclose()
        finally:  # also if a device hangs
            await self.stop_coordinator()

    async def start_coordinator(self) -> None:
        """Start the coordinator, on the ports that it had before."""
        settings = CoordinatorSettings(
            state=self.folder / "coordinator",
            metrics_port=0,
            **{"reconnect_grace_s": 5.0, **self.ports, **self.settings},  # type: ignore[arg-type]
        )
        self.coordinator = await self._coordinator_stack.enter_async_context(
            Coordinator(settings, clock=self.clock, certificate_clock=self.certificate_clock)
        )
        addresses = self.coordinator.addresses
        self.ports = {
            "port": int(addresses.device.rpartition(":")[2]),
            "enrol_port": int(addresses.enrol.rpartition(":")[2]),
        }
        self.operator = await self._coordinator_stack.enter_async_context(
            connect(self.folder / "coordinator")
        )

    async def stop_coordinator(self) -> None:
        """Stop the coordinator; its state stays."""
        async with asyncio.timeout(PATIENCE_S):
            await self._coordinator_stack.aclose()

    async def enrol(self, name: str, group: str = "default") -> Path:
        """Enrol a device; gives its folder."""
        token = await self.operator.create_token(group, 600)
        await enrol(token.token, self.folder / name, name)
        return self.folder / name

    def start_device(
        self,
        name: str,
        options: Mapping[str, Scalar] | None = None,
        *,
        trainer: str = "constant_trainer:make",
        address: str = "",
        **settings: Any,
    ) -> None:
        """Run an enrolled device.

        Args:
            name: which.
            options: what its trainer is made with; None: it only runs models.
            trainer: which one.
            address: where it dials instead of the coordinator, for instance a proxy.
            settings: what else the agent is made with, for instance `allow_plain`.
        """
        folder = self.folder / name
        process = None
        if options is not None:
            add_to_path(TRAINERS)
            process = self.trainers[name] = TrainerProcess(trainer, options)
        self.models[name] = ModelRepository()
        self.metrics[name] = Metrics()
        link = Link(
            address or CoordinatorAddress.load(folder).device_address,
            load_identity(folder),
            keep=partial(save_identity, folder),
            clock=self.certificate_clock,
            check_interval_s=0.02,
        )
        agent = Agent(
            link=link,
            trainer=process,
            slots=ModelSlots(folder / "models"),
            models=self.models[name],
            metrics=self.metrics[name],
            keepsakes=Keepsakes(folder / "learning"),
            **settings,
        )
        self._agents[name] = asyncio.create_task(agent.run(), name=name)

    async def add(self, name: str, options: Mapping[str, Scalar] | None = None, **how: Any) -> None:
        """Enrol a device and run it, as `start_device` does."""
        await self.enrol(name)
        self.start_device(name, options, **how)

    @asynccontextmanager
    async def stream(self, name: str, hello: pb.Hello | None = None) -> AsyncIterator[Stream]:
        """Speak for an enrolled device by hand, greeted already if it says hello."""
        address = self.operator.address
        async with transport.open_channel(address, load_identity(self.folder / name)) as channel:
            call = pb_grpc.FederationServiceStub(channel).Session()
            if hello is not None:
                await call.write(pb.SessionRequest(hello=hello))
                assert (await call.read()).WhichOneof("body") == "welcome"
            yield call

    async def until(self, holds: Callable[[list[pb.Device]], bool]) -> list[pb.Device]:
        """Wait until something holds of the list of devices."""
        async with asyncio.timeout(PATIENCE_S):
            while not holds(devices := await self.operator.devices()):
                await asyncio.sleep(0.01)
        return devices

    async def stop_device(self, name: str) -> None:
        """End a device without a word to the coordinator."""
        task = self._agents.pop(name)
        task.cancel()
        await asyncio.wait([task], timeout=PATIENCE_S)
        assert task.done(), f"{name} does not stop: {task.get_stack()}"

    async def device_ends(self, name: str) -> BaseException | None:
        """Wait until a device ends by itself; gives what ended it."""
        task = self._agents.pop(name)
        await asyncio.wait([task], timeout=PATIENCE_S)
        return task.exception()

    async def start_campaign(self, plan: pb.CampaignPlan, model: Parameters | None = None) -> str:
        """Start a campaign from a toy model."""
        return await self.operator.start_campaign(plan, to_bytes(model or toy_model()))

    async def reach(self, campaign_id: str, *stages: int) -> pb.Campaign:
        """Wait until the newest round is in one of some stages."""
        async with asyncio.timeout(PATIENCE_S):
            async for campaign in self.operator.watch(campaign_id):
                if campaign.rounds and campaign.rounds[-1].stage in stages:
                    return campaign
        raise AssertionError(f"the campaign ended before: {campaign}")

    async def finish(self, campaign_id: str, operator: Operator | None = None) -> pb.Campaign:
        """Wait for a campaign's end."""
        async with asyncio.timeout(PATIENCE_S):
            async for campaign in (operator or self.operator).watch(campaign_id):
                last = campaign
        return last
