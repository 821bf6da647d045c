from tests.stages.conftest import new_job as new_job  # the same fixture as the tests of stages use
