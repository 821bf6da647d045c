#!lua
-- stage: put members of a large batch aside, for `batch` to commit all of them at once.
-- ARGV[1] batch id  ARGV[2] how long they wait to be committed (ms)  ARGV[3] stream  ARGV[4] tenant  ARGV[5] deadline_ms
-- then per member 3 values: id, tail (envelope without its head), row for the recorder (JSON)
-- Returns: time (us), 'staged' | 'late' (the batch was committed; nothing was changed).
-- Invariant: what is staged is no job yet: no index, no list and no stream knows it, and it goes by itself. May be sent
--   again: a member that was staged twice is one, and a row that stands twice is written once.
local now_us = clock_us()
local batch, ttl_ms = ARGV[1], ARGV[2]
local rows = KEY.rows .. batch
if call('EXISTS', KEY.batch .. batch) == 1 then return {digits(now_us), 'late'} end
check_accept()
check_type(rows, 'list')
for i = 6, #ARGV, 3 do
  local key = KEY.live .. ARGV[i]
  call('HSET', key, 'stream', ARGV[3], 'entry', '', 'tenant', ARGV[4], 'body', envelope(ARGV[i], ARGV[i + 1], now_us),
    'vector', '', 'deadline', ARGV[5], 'record', 'message ' .. batch)
  call('PEXPIRE', key, ttl_ms)
  call('RPUSH', rows, ARGV[i + 2])
end
call('PEXPIRE', rows, ttl_ms)
conclude()
return {digits(now_us), 'staged'}
