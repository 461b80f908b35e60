"""A server's TLS, with certificates that are exchanged while it runs."""

import logging
import threading

import grpc

from zimage_core.errors import InvalidSettings
from zimage_core.tls import Tls

_log = logging.getLogger(__name__)


def server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """Reads the files anew for whoever connects after they changed. With `tls.ca`, callers must
    show a certificate, too."""
    files = _Files(tls)
    return grpc.dynamic_ssl_server_credentials(
        files.first,
        files.changed,  # type: ignore[arg-type]  # None for no change is what gRPC documents
        require_client_authentication=tls.ca is not None,
    )


class _Files:
    """Asked at every handshake, on threads of gRPC's."""

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._lock = threading.Lock()
        self._stamp = tls.stamp()
        self.first = self._configuration()

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """What the files say, if that is new and whole; half of an exchange changes nothing."""
        with self._lock:
            stamp = self._tls.stamp()
            if stamp == self._stamp:
                return None
            self._stamp = stamp
            try:
                configuration = self._configuration()
            except InvalidSettings as error:
                _log.error("the certificate stays what it was: %s", error.message)
                return None
        _log.info("certificates were exchanged")
        return configuration

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        pems = self._tls.read()
        assert pems.key is not None
        assert pems.cert is not None
        return grpc.ssl_server_certificate_configuration([(pems.key, pems.cert)], pems.ca)
