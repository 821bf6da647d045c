#!lua flags=no-writes
-- look: where is a job?
-- ARGV[1] job id
-- Returns: {'finished', completion} | {'queued' | 'running', tenant} | {'unknown'}.
local done = call('GET', KEY.completion .. ARGV[1])
if done then return {'finished', done} end
local live = call('HMGET', KEY.live .. ARGV[1], 'entry', 'stream', 'tenant')
local entry, stream, tenant = live[1], live[2], live[3]
if not stream then return {'unknown'} end
return {entry ~= '' and pending(stream, group_of(stream), entry) and 'running' or 'queued', tenant}
