#!lua
-- report: is this report there already, is somebody writing it, or is this job to write it?
-- ARGV[1] hash of what is asked (as it stands in keys)  ARGV[2] job id  ARGV[3] the longest life of a job (ms)
-- ARGV[4] 'fresh' when the job is to write it in any case, else ''  ARGV[5] the person (as they stand in keys)  ARGV[6] the
--   job's epoch of theirs
-- Returns: 'cached' and the report | 'wait' (another job that lives is writing it) | 'write' | 'forgotten' (the person was
--   erased).
-- Invariant: of jobs that ask the same, one writes at a time, unless it is to be fresh; when it ends without a report,
--   the next one to look writes.
local cache, making = KEY.report .. ARGV[1], KEY.report_making .. ARGV[1]
check_type(cache, 'string')
check_type(making, 'string')
check_type(KEY.user .. ARGV[5], 'hash')
if is_forgotten({owner = ARGV[5], epoch = ARGV[6]}) then return {'forgotten', ''} end
if ARGV[4] == '' then
  local text = call('GET', cache)
  if text then return {'cached', text} end
  local writer = call('GET', making)
  if writer and writer ~= ARGV[2] and call('EXISTS', KEY.live .. writer) == 1 then return {'wait', ''} end
end
call('SET', making, ARGV[2], 'PX', ARGV[3])
return {'write', ''}
