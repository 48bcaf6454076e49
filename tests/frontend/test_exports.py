"""What `import gapless` gives, and what it does not drag in."""

import subprocess
import sys

import gapless


def modules_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.splitlines())


def test_every_exported_name_is_there():
    for name in gapless.__all__:
        assert getattr(gapless, name) is not None
    assert set(dir(gapless)) == set(gapless.__all__)


def test_every_error_is_exported():
    from gapless import errors

    raised = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert raised <= set(gapless.__all__)


def test_importing_gapless_loads_neither_torch_nor_numpy():
    assert not {"torch", "numpy"} & modules_after("import gapless; gapless.__version__")


def test_help_loads_no_torch():
    code = "from gapless.cli.main import main\ntry:\n    main(['generate', '--help'])\nexcept SystemExit: pass"
    assert not {"torch", "tokenizers", "huggingface_hub"} & modules_after(code)
