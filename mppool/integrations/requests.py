"""requests: an ``HTTPAdapter`` whose connections all worker processes of the host share.

    import requests
    from mppool.integrations.requests import HTTPAdapter

    session = requests.Session()
    session.mount("http://", HTTPAdapter(pool_maxsize=8))

At most eight connections to each origin are open, of all workers together.
"""

from __future__ import annotations

from typing import Any

try:
    import requests.adapters
except ImportError as error:
    raise ImportError("mppool needs requests for this: pip install 'mppool[requests]'") from error

from urllib3.exceptions import EmptyPoolError

from mppool.integrations.urllib3 import PoolManager, ProxyManager

__all__ = ["HTTPAdapter"]


class HTTPAdapter(requests.adapters.HTTPAdapter):
    """In the place of ``requests.adapters.HTTPAdapter``. There is one pool for each origin (scheme, host and port), which all worker processes share.

    ``pool_maxsize`` (default 10) is the strict cap for each origin, of all workers together. ``shared`` are options of ``mppool.Pool``:
    ``{"broker": path, "autostart": True, "max_idle": 60}``.

    What differs from requests' own:

    - There are no connections beyond ``pool_maxsize``. A request that finds none free waits, also without ``pool_block``: then for at most 30 s, after
      which requests.exceptions.ConnectionError is raised.
    - Mounted for ``https://`` it makes resident connections: they stay with the process that made them. They count in the same cap.
    - Connections through a SOCKS proxy are requests' own, outside of the cap.
    - Closing the session lets this process go; connections that other processes may use stay open.
    """

    def __init__(self, *args: Any, shared: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._shared = shared
        self.__attrs__ = [*requests.adapters.HTTPAdapter.__attrs__, "__attrs__", "_shared"]  # to be pickled
        super().__init__(*args, **kwargs)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **pool_kwargs: Any) -> None:
        super().init_poolmanager(connections, maxsize, block, **pool_kwargs)  # which remembers these for pickling
        self._sizes = {"num_pools": connections, "maxsize": maxsize, "block": block}
        self.poolmanager = PoolManager(**self._sizes, shared=self._shared, **pool_kwargs)

    def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().send(request, *args, **kwargs)
        except EmptyPoolError as error:  # which requests does not know: its own pools are never empty
            raise requests.exceptions.ConnectionError(error, request=request) from error

    def proxy_manager_for(self, proxy: str, **proxy_kwargs: Any) -> Any:
        if proxy in self.proxy_manager or proxy.lower().startswith("socks"):
            return super().proxy_manager_for(proxy, **proxy_kwargs)
        self.proxy_manager[proxy] = ProxyManager(
            proxy,
            proxy_headers=self.proxy_headers(proxy),
            **self._sizes,
            shared=self._shared,
            **proxy_kwargs,
        )
        return self.proxy_manager[proxy]
