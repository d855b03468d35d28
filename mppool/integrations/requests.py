"""requests: an ``HTTPAdapter`` whose connections all worker processes of the host share.

import requests
from mppool.integrations.requests import HTTPAdapter

session = requests.Session()
session.mount("http://", HTTPAdapter(pool_maxsize=8))
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
    """``requests.adapters.HTTPAdapter``; ``pool_maxsize`` (default 10) is the cap for each origin of all workers together.

    Without ``pool_block`` a request waits for a connection for 30 s at most, then requests.exceptions.ConnectionError is raised.
    ``shared`` are options of ``mppool.Pool``: ``{"broker": path, "autostart": True, "max_idle": 60}``. Closing the session lets this process go.
    Mounted for ``https://`` it makes connections that stay with their process, in the same cap. Those through a SOCKS proxy are requests' own, outside of it.
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
