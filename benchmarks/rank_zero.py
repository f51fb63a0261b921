"""Rank 0 of every job, as far as the operator asks it: progress that moves, at its address."""

import time
from datetime import UTC, datetime

from aiohttp import web

from tempflow_api.naming import PROGRESS_PATH, PROGRESS_PORT
from tempflow_api.status import Progress

# Less than the operator's interval: every read brings something new, which is then written.
EPOCH_SECONDS = 10.0
EPOCHS = 100_000


class RanksZero:
    """A listener for each pod, all answered here."""

    def __init__(self) -> None:
        app = web.Application()
        app.router.add_get(PROGRESS_PATH, self._answer)
        self._runner = web.AppRunner(app, access_log=None)
        self._runs: dict[str, str] = {}
        self._sites: dict[str, web.TCPSite] = {}
        self._started = time.monotonic()

    async def start(self) -> None:
        await self._runner.setup()

    async def serve(self, address: str, run_id: str) -> None:
        """From now on, first attempt of ``run_id`` answers at that address."""
        self._runs[address] = run_id
        if address not in self._sites:
            site = self._sites[address] = web.TCPSite(self._runner, address, PROGRESS_PORT)
            await site.start()

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        if request.transport is None:
            raise web.HTTPInternalServerError
        address = request.transport.get_extra_info("sockname")[0]
        now = datetime.now(UTC)
        progress = Progress(
            epoch=int((time.monotonic() - self._started) / EPOCH_SECONDS),
            epochs=EPOCHS,
            phase="rollout",
            attempt=1,
            run_id=self._runs[address],
            reward=0.5,
            time=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
        return web.json_response(text=progress.model_dump_json(by_alias=True, exclude_none=True))
