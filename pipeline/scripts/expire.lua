#!lua flags=allow-oom
-- expire: end jobs whose deadline has passed while nobody works on them.
-- ARGV[1] at most (jobs)  ARGV[2] life of a completion (ms)  ARGV[3] dead letters at most  ARGV[4] their greatest age (ms)
-- Returns: time (us), jobs ended as expired, jobs ended as lost (their entry had vanished).
-- Invariant: a job in the hands of a living consumer is left to it; whoever removes the entry writes the outcome. What was
--   to follow from a batch (its results in one piece, its webhook) is not dropped without a word: its own job is buried.
local now_us = clock_us()
local now_ms = math.floor(now_us / 1000)
local expired, lost = 0, 0
local has_letter = {batch = true, delivery = true}

-- data: the envelope of the job; nil when it has vanished.
local function bury_story(id, live, status, code, message, data, deliveries)
  if not has_letter[live.kind] then return end
  local why = '{"type":"' .. status .. '","code":"' .. code .. '","message":"' .. message .. '"}'
  bury('{"reason":"' .. code .. '","job_id":"' .. id .. '","error":' .. why .. ',"attempts":' .. (live.attempts or '0')
    .. ',"deliveries":' .. (deliveries or 0) .. ',"stage":"' .. group_of(live.stream) .. '","stream":"' .. live.stream
    .. '","entry":"' .. live.entry .. '","worker":"","at_ms":' .. digits(now_ms) .. ',"original":'
    .. (data and cjson.encode(data) or 'null') .. '}', ARGV[3], tonumber(ARGV[4]), now_us)
end

for _, id in ipairs(call('ZRANGEBYSCORE', KEY.live_index, '-inf', digits(now_ms), 'LIMIT', 0, ARGV[1])) do
  local readable, live = pcall(read_live, id)
  if not readable or (live and has_letter[live.kind] and not has_type(KEY.dead, 'stream')) then
    call('ZADD', KEY.live_index, digits(now_ms + 1000), id) -- a key of a wrong type: an operator must act, others pass
  elseif not live then
    call('ZREM', KEY.live_index, id)
  elseif live.kind == 'message' and has_type(KEY.staged, 'zset') and call('ZSCORE', KEY.staged, live.batch) then
    call('ZADD', KEY.live_index, digits(now_ms + 1000), id) -- it is no job yet, and may never be one
  else
    local late = {'expired', 'deadline_exceeded', 'the deadline passed while the job was waiting'}
    local text = ended(id, live, late[1], late[2], late[3], now_us)
    if live.entry == '' then
      bury_story(id, live, late[1], late[2], late[3], live.body)
      call('ZREM', KEY.delayed, id)
      finish(id, live, text, ARGV[2])
      expired = expired + 1
    else
      local group = group_of(live.stream)
      local owner, deliveries = pending(live.stream, group, live.entry)
      local rows = call('XRANGE', live.stream, live.entry, live.entry)
      if owner and call('EXISTS', KEY.worker .. owner) == 1 then
        call('ZADD', KEY.live_index, digits(now_ms + 1000), id) -- look again in a second
      elseif #rows == 0 then
        bury_story(id, live, 'failed', 'lost', 'the stream entry of this job vanished', nil, deliveries)
        finish(id, live, ended(id, live, 'failed', 'lost', 'the stream entry of this job vanished', now_us), ARGV[2])
        lost = lost + 1
      else
        bury_story(id, live, late[1], late[2], late[3], field_of(rows[1][2], 'data'), deliveries)
        if owner then call('XACK', live.stream, group, live.entry) end
        call('XDEL', live.stream, live.entry)
        finish(id, live, text, ARGV[2])
        expired = expired + 1
      end
    end
  end
end
conclude()
return {digits(now_us), expired, lost}
