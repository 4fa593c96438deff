import pytest

from gqa_scaling import cli


@pytest.fixture
def said(workplace, capsys):
    """main([...]) in the empty working directory: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        told = capsys.readouterr()
        return code, told.out, told.err

    return call
