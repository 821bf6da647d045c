#!lua
-- stage: put members of a large batch aside, for `batch` to commit all of them at once.
-- ARGV[1] batch id  ARGV[2] number of the first of these members (0..)  ARGV[3] stream  ARGV[4] tenant  ARGV[5] deadline_ms
-- then per member 3 values: id, tail (envelope without its head), row for the recorder (JSON)
-- Returns: time (us), 'staged' | 'late' (the batch was committed) | 'unstaged' (members before these are gone again: begin
--   anew). Only the first changes anything, and only what was not done before.
-- Invariant: what is staged is no job yet, but is counted as one by admission: it is in the index of live jobs, on no stream
--   and not among the delayed jobs. The lists of a staging hold its first members, in order, whatever is sent again.
local now_us = clock_us()
local batch, first, FIRST = ARGV[1], tonumber(ARGV[2]), 6
local members, rows, count = KEY.batch_members .. batch, KEY.rows .. batch, (#ARGV - FIRST + 1) / 3
local function answer(word) return {digits(now_us), word} end
if call('EXISTS', KEY.batch .. batch) == 1 then return answer('late') end
check_accept()
check_type(KEY.staged, 'zset')
local there = call('LLEN', members)
if there >= first + count then return answer('staged') end
if there < first or call('LLEN', rows) ~= there then return answer('unstaged') end

local ids, told, index = {}, {}, {}
for i = FIRST + 3 * (there - first), #ARGV, 3 do
  local id = ARGV[i]
  call('HSET', KEY.live .. id, 'stream', ARGV[3], 'entry', '', 'tenant', ARGV[4], 'body', envelope(id, ARGV[i + 1], now_us),
    'vector', '', 'deadline', ARGV[5], 'record', 'message ' .. batch)
  ids[#ids + 1], told[#told + 1] = id, ARGV[i + 2]
  index[#index + 1] = ARGV[5]
  index[#index + 1] = id
end
call('ZADD', KEY.live_index, unpack(index))
call('RPUSH', members, unpack(ids))
call('RPUSH', rows, unpack(told))
call('ZADD', KEY.staged, digits(math.floor(now_us / 1000)), batch)
conclude()
return answer('staged')
