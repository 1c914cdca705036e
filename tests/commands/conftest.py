"""What commands are tested with beside what all tests have: a reward server in a thread."""

from tests.remote.conftest import no_token, serve  # noqa: F401 - fixtures
