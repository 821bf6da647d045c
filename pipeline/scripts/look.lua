#!lua flags=no-writes
-- look: where is a job?
-- ARGV[1] job id
-- Returns: {'finished', completion} | {'queued' | 'running', tenant} | {'unknown'}.
local done = call('GET', KEY.completion .. ARGV[1])
if done then return {'finished', done} end
local live = read_live(ARGV[1])
if not live then return {'unknown'} end
local runs = live.entry ~= '' and pending(live.stream, group_of(live.stream), live.entry)
return {runs and 'running' or 'queued', live.tenant}
